"""Laplace-LoRA: curvature, marginal likelihood and predictive distribution against dense references."""

import copy
import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import peftlib
from peftlib import report
from peftlib.conformance.case import batch, tokenizer, train
from peftlib.errors import DataError, PeftlibError, StateError, UnsupportedError
from peftlib.methods.reparameterized.lora.improvements.laplace_lora import Posterior, softmax_curvature_root
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, kaiming_uniform, tiny, zeros
from tests.methods.helpers import backbone, inputs, perturb

OPTIONS = {"rank": 2, "targets": ("attention.value",), "dropout": 0.0, "samples": 2000}


def _trained(family="bert", **options):
    """A small LoRA away from its start, in float64 and in evaluation mode."""
    adapted = peftlib.attach(backbone(family).double(), "laplace_lora", **(OPTIONS | options))
    perturb(adapted)
    adapted.model.double().eval()
    return adapted


def _one_token(count=1, labels=(1, 0, 1)):
    ids = torch.tensor([[2], [17], [40]])[:count]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels[:count])}


def _weights(adapted):
    return [p for update in adapted.method.updates.values() for p in (update.A, update.B)]


def _jacobians(adapted, data):
    """For A and B of each update the dense Jacobian of the logits, (N, C, entries)."""
    logits = adapted.model(**{k: v for k, v in data.items() if k != "labels"}).logits
    rows = [
        [torch.autograd.grad(logits[n, c], _weights(adapted), retain_graph=True) for c in range(logits.shape[1])]
        for n in range(len(logits))
    ]
    return logits.detach(), [
        torch.stack([torch.stack([c[i].flatten() for c in n]) for n in rows]) for i in range(len(_weights(adapted)))
    ]


def _dense_blocks(posterior):
    """Kronecker products of the factors, over the entries of a weight row by row."""
    return [torch.kron((V * b) @ V.T, (U * a) @ U.T) for a, U, b, V in posterior.blocks]


def test_the_roots_give_the_hessian_of_the_softmax_loss():
    logits = torch.randn(3, 4, dtype=torch.float64)
    roots = softmax_curvature_root(logits)
    for row, root in zip(logits, roots):
        hessian = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, torch.tensor(2)), row)
        torch.testing.assert_close(root.T @ root, hessian)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_one_example_of_one_token_has_the_exact_curvature(family):
    """There the Kronecker product is the generalized Gauss-Newton matrix J^T (diag(p) - p p^T) J of each factor."""
    adapted, data = _trained(family), _one_token()
    adapted.method.fit([data])
    logits, jacobians = _jacobians(adapted, data)
    p = logits[0].softmax(-1)
    curvature = torch.diag(p) - torch.outer(p, p)
    for J, block in zip(jacobians, _dense_blocks(adapted.method.posterior)):
        exact = J[0].T @ curvature @ J[0]
        torch.testing.assert_close(block, exact, atol=1e-9 * float(exact.abs().max()), rtol=1e-6)


def test_factors_are_means_of_inputs_and_sums_of_gradients():
    adapted, data = _trained(), _one_token(3)
    adapted.method.fit([{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}])
    singles = []
    for n in range(3):
        other = copy.deepcopy(adapted.model).peftlib_adapted
        other.method.fit([{k: v[n : n + 1] for k, v in data.items()}])
        singles.append(other.method.posterior.blocks)
    for i, (a, U, b, V) in enumerate(adapted.method.posterior.blocks):
        left = sum((s[i][1] * s[i][0]) @ s[i][1].T for s in singles) / 3
        right = sum((s[i][3] * s[i][2]) @ s[i][3].T for s in singles)
        torch.testing.assert_close((U * a) @ U.T, left, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close((V * b) @ V.T, right, atol=1e-9, rtol=1e-6)


def test_the_factors_are_those_of_the_authors_code():
    """ASDL sums x x^T over all positions of all texts (``Linear.cov_kron_A``), laplace-lora divides that by the number
    of texts (``AsdlInterface._rescale_kron_factors``). Run beside ours in float64 on this model and these five tokens a
    text, the two gave the same factors, to the last digits, and a prior precision of 1.5179."""
    adapted, data = _trained(targets=("attention.query", "attention.value")), batch("bert")
    shortest = int(data["attention_mask"].sum(1).min())
    data = {k: v[:, :shortest] if v.dim() > 1 else v for k, v in data.items()}
    seen = {}
    for update in adapted.method.updates.values():
        update.register_forward_hook(lambda module, args, output: seen.update({module: args[0].detach()}))
    precision = adapted.method.fit([{k: v[i::2] for k, v in data.items()} for i in (0, 1)])
    with torch.no_grad():
        adapted.model(**data)
    blocks = iter(adapted.method.posterior.blocks)
    for update in adapted.method.updates.values():
        x = seen[update].flatten(0, 1)  # (N t, in)
        for inputs_ in (x, x @ update.A.T.detach()):
            a, U, _, _ = next(blocks)
            torch.testing.assert_close((U * a) @ U.T, inputs_.T @ inputs_ / len(data["labels"]), atol=1e-9, rtol=1e-6)
    assert precision == pytest.approx(1.5179, abs=1e-4)


def test_marginal_likelihood_is_the_dense_one_and_its_maximum_is_found():
    adapted, data = _trained(), batch("bert")
    found = adapted.method.fit([data])
    posterior = adapted.method.posterior
    logits = adapted.model(**data).logits.detach()
    weights = torch.cat([w.detach().flatten() for w in _weights(adapted)])
    for precision in (0.3, found):
        expected = -float(F.cross_entropy(logits, data["labels"], reduction="sum"))
        expected -= precision / 2 * float(weights @ weights)
        for block in _dense_blocks(posterior):
            posterior_precision = block + precision * torch.eye(len(block), dtype=block.dtype)
            expected -= (float(torch.logdet(posterior_precision)) - len(block) * math.log(precision)) / 2
        assert float(posterior.log_marginal_likelihood(torch.tensor(precision))) == pytest.approx(expected, rel=1e-6)
    grid = [float(posterior.log_marginal_likelihood(torch.tensor(10.0**e))) for e in torch.linspace(-3, 4, 60)]
    assert float(posterior.log_marginal_likelihood(torch.tensor(found))) >= max(grid) - 0.02


def test_the_covariance_of_the_logits_is_the_dense_one():
    adapted, data = _trained(), inputs("bert")
    adapted.method.fit([batch("bert")])
    posterior = adapted.method.posterior
    mean, covariance = posterior.logits(data)
    logits, jacobians = _jacobians(adapted, data)
    torch.testing.assert_close(mean, logits)
    expected = torch.zeros_like(covariance)
    for J, block in zip(jacobians, _dense_blocks(posterior)):
        eye = torch.eye(len(block), dtype=block.dtype)
        expected += J @ torch.linalg.inv(block + posterior.precision * eye) @ J.transpose(1, 2)
    torch.testing.assert_close(covariance, expected, atol=1e-9, rtol=1e-6)
    assert torch.linalg.eigvalsh(covariance).min() > 0


def test_probabilities_average_the_softmax_over_the_gaussian():
    adapted, data = _trained(samples=20_000), inputs("bert")
    adapted.method.fit([batch("bert")])
    mean, covariance = adapted.method.posterior.logits(data)
    got = adapted.method.predict(data)
    assert torch.equal(got, adapted.method.predict(data))
    torch.testing.assert_close(got.sum(1), torch.ones(3))
    points, weights = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(60))
    for m, c, p in zip(mean, covariance, got):
        # Two classes: their difference is a Gaussian of one dimension.
        spread = (c[0, 0] + c[1, 1] - 2 * c[0, 1]).sqrt()
        exact = (weights * torch.sigmoid(m[0] - m[1] + spread * points)).sum() / weights.sum()
        assert float(p[0]) == pytest.approx(float(exact), abs=0.01)
    adapted.method.posterior.precision = 1e12
    torch.testing.assert_close(adapted.method.predict(data), mean.softmax(-1).float(), atol=1e-4, rtol=0)


def test_padding_does_not_count():
    whole, apart = _trained(), _trained()
    data = batch("bert")
    whole.method.fit([data])
    apart.method.fit(
        [
            {k: v[i : i + 1, :length] if v.dim() > 1 else v[i : i + 1] for k, v in data.items()}
            for i, length in enumerate(data["attention_mask"].sum(1).tolist())
        ]
    )
    assert whole.method.posterior.precision == pytest.approx(apart.method.posterior.precision, rel=1e-4)
    for mine, other in zip(_dense_blocks(whole.method.posterior), _dense_blocks(apart.method.posterior)):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)


def test_after_training_predictions_are_less_sure_and_the_model_is_as_it_was(tmp_path):
    adapted = peftlib.attach(backbone("bert"), "laplace_lora", rank=4)
    data = batch("bert")
    train(adapted, data, steps=40, rate=0.02)
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    with torch.no_grad():
        sure = adapted.model(**inputs("bert")).logits.softmax(-1)
    adapted.model.train()
    adapted.method.fit([data])
    got = adapted.method.predict(inputs("bert"))
    assert adapted.model.training
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items())
    assert all(p.grad is None for p in adapted.model.parameters())
    assert (got.max(1).values < sure.max(1).values).all()

    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
    with pytest.raises(StateError, match=r"adapted\.method\.fit"):
        loaded.method.predict(inputs("bert"))
    loaded.method.fit([data])
    torch.testing.assert_close(loaded.method.predict(inputs("bert")), got)


@pytest.mark.parametrize(
    "method", ["laplace_lora", peftlib.combine("bitfit", "laplace_lora")], ids=["alone", "combined"]
)
def test_the_loop_fits_it_on_the_training_data_and_evaluations_use_it(method):
    adapted = peftlib.attach(backbone("bert"), method)
    task = peftlib.tasks.load("smoke")
    result = peftlib.fit(adapted, task, tokenizer=tokenizer("bert"), steps=60, learning_rate=2e-2, progress=False)
    laplace = getattr(adapted.method, "parts", [adapted.method])[-1]
    fitted = laplace.posterior.precision
    nll = own = rows = 0.0
    for data in task.loader("validation", tokenizer("bert"), batch_size=32):
        own += float(F.cross_entropy(adapted.model(**data).logits.detach(), data["labels"], reduction="sum"))
        probabilities = adapted.method.predict(data)
        nll -= float(probabilities.gather(1, data["labels"][:, None]).log().sum())
        rows += len(data["labels"])
    # Draws are seeded, but a row's come from its place in the batch, and evaluation sorts by length.
    assert result.metrics["nll"] == pytest.approx(nll / rows, abs=2e-3)
    assert abs(result.metrics["nll"] - own / rows) > 1e-2
    assert result.metrics["loss"] == pytest.approx(result.metrics["nll"], abs=1e-5)
    assert laplace.fit(task.loader("train", tokenizer("bert"), batch_size=16)) == pytest.approx(fitted, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "task", "head"),
    [("tiny-bert", "smoke-regression", {"num_labels": 1}), ("tiny-gpt2", "smoke-lm", {"head": "causal_lm"})],
)
def test_the_loop_fits_nothing_where_there_are_no_classes(name, task, head):
    loaded = peftlib.backbones.load(name, **head)
    adapted = peftlib.attach(loaded.model, "laplace_lora")
    peftlib.fit(adapted, peftlib.tasks.load(task), tokenizer=loaded.tokenizer, steps=2, progress=False)
    assert not adapted.method.fitted


def test_what_it_cannot_do():
    with pytest.raises(DataError, match="no batches"):
        _trained().method.fit([])
    adapted = peftlib.attach(backbone("llama", "causal_lm"), "laplace_lora")
    with pytest.raises(UnsupportedError, match="classification head"):
        adapted.method.fit([batch("llama", "causal_lm")])
    for options in ({"rank": 0}, {"samples": 0}):
        with pytest.raises(PeftlibError, match="0"):
            peftlib.attach(backbone("bert"), "laplace_lora", **options)


def test_reliability():
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.3, 0.7], [0.0, 1.0], [0.35, 0.65]])
    table = report.reliability(probabilities, torch.tensor([0, 1, 1, 1, 0]))
    assert table["count"].tolist() == [0] * 6 + [2, 0, 0, 3]
    assert table.loc[9, "confidence"] == pytest.approx((0.95 + 0.92 + 1.0) / 3)
    assert table.loc[9, "accuracy"] == pytest.approx(2 / 3)
    assert table.loc[6, ["confidence", "accuracy"]].tolist() == pytest.approx([0.675, 0.5])
    expected = 3 / 5 * abs(2 / 3 - 2.87 / 3) + 2 / 5 * 0.175
    assert report.calibration_error(table) == pytest.approx(expected, abs=1e-6)
    (axes,) = report.reliability_diagram({"MAP": table}).axes
    assert axes.lines[1].get_xdata().tolist() == pytest.approx([0.675, 2.87 / 3])
    assert "ECE 0.2" in axes.get_legend().get_texts()[0].get_text()
    assert isinstance(table, pd.DataFrame)
    with pytest.raises(DataError, match="do not fit"):
        report.reliability(probabilities, torch.tensor([0]))


# What is published

SCRIPT = "adamxyang/laplace-lora, run_classification_bert_laplace.py, parse_args"
PEFT = "adamxyang/laplace-lora, run_classification_bert.py: HF peft's LoraConfig"


def check_prior():
    """Adam on the logarithm of one precision for all weights, from 1, 1,000 steps at 0.1."""
    defaults = inspect.signature(Posterior.fit_precision).parameters
    assert (defaults["steps"].default, defaults["rate"].default) == (1000, 0.1)
    adapted = tiny("laplace_lora")
    posterior = Posterior(adapted.model, adapted.method.updates.values(), [batch("bert")])
    assert posterior.precision == 1.0


def check_head():
    """``modules_to_save`` is left out of the Gaussian."""
    adapted = tiny("laplace_lora")
    posterior = Posterior(adapted.model, adapted.method.updates.values(), [batch("bert")])
    assert len(posterior.blocks) == 2 * len(adapted.method.updates)
    assert all(p.requires_grad for p in adapted.host.anatomy.head.values())


FACTS = Facts(
    "laplace_lora",
    Default("rank", 8, SCRIPT),
    Default("alpha", 16.0, SCRIPT),
    Default("dropout", 0.1, SCRIPT),
    Default("samples", 100_000, f"{SCRIPT}: mc_corr_100000"),
    Default(
        "targets",
        ("*attention.query", "*attention.value"),
        f"{PEFT}, whose targets on RoBERTa are these; run_gpt.py: v_proj, q_proj and the language-model head",
    ),
    Start("*.lora.A", kaiming_uniform(), PEFT),
    Start("*.lora.B", zeros(), PEFT),
    Trains(("*.lora.A", "*.lora.B"), PEFT),
    Holds("the prior is fitted from 1 in 1000 steps", check_prior, f"{SCRIPT}; laplace/baselaplace.py"),
    Holds("the head has no Gaussian", check_head, "adamxyang/laplace-lora, laplace/baselaplace.py, fit"),
    Count("roberta-base", 294_912, "LoRA's of rank 8"),
    Count("t5-base", 884_736, "LoRA's of rank 8"),
    Count("llama-7b", 4_194_304, "LoRA's of rank 8, without the language-model head's"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
