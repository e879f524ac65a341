"""OFT: its equation, the authors' and HF peft's forms of it, published counts, the constraint, files of HF peft."""

import json
import warnings

import peft
import pytest
import torch

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import ConfigError, TargetError, UnsupportedError
from peftlib.methods.since_survey.oft import Rotation
from tests.methods.facts import Count, Default, Facts, Start, Trains, tiny, zeros
from tests.methods.helpers import Spy, backbone, inputs, perturb

# family: (our sites, HF peft's target_modules); HF peft has no OFT of GPT-2's Conv1D.
PARITY = {
    "bert": (
        "all-linear",
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", r"\d.output.dense"],
    ),
    "llama": ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "t5": ("all-linear", ["q", "k", "v", "o", "wi", "wo"]),
}
# our options: HF peft's
FORMS = {
    "exact": ({}, {"use_cayley_neumann": False}),
    "neumann": ({"terms": 5}, {"use_cayley_neumann": True}),
    "six terms": ({"terms": 6}, {"num_cayley_neumann_terms": 6}),
    "shared": ({"block_share": True}, {"use_cayley_neumann": False, "block_share": True}),
}


def skew(upper: torch.Tensor, s: int) -> torch.Tensor:
    Q = torch.zeros(s, s, dtype=torch.float64)
    numbers = iter(upper)
    for i in range(s):
        for j in range(i + 1, s):
            Q[i, j] = next(numbers)
            Q[j, i] = -Q[i, j]
    return Q


def rotation(upper: torch.Tensor, s: int) -> torch.Tensor:
    """R of the equation: the blocks (I + Q_i)(I - Q_i)^-1 along the diagonal."""
    one = torch.eye(s, dtype=torch.float64)
    return torch.block_diag(*((one + Q) @ torch.linalg.inv(one - Q) for Q in (skew(row, s) for row in upper)))


def neumann(Q: torch.Tensor, terms: int) -> torch.Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)."""
    powers = [torch.linalg.matrix_power(Q, n) for n in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@torch.no_grad()
def test_equation_on_every_map(family):
    """y = W R x + b, also where GPT-2's query, key and value share the input; then the same after the merge."""
    model = backbone(family).double()
    adapted = peftlib.attach(model, "oft", block_size=8, targets="all-linear")
    model.double()
    perturb(adapted)
    updates = dict(adapted.method.updates)
    expected = {site: site.weight @ rotation(update.Q, 8) for site, update in updates.items()}
    spy = Spy(*(site.module for site in updates))
    model(**inputs(family))
    for site, weight in expected.items():
        rotated, y = spy[site.module]  # the hook sees what the rotation gave
        x = rotated @ torch.linalg.inv(rotation(updates[site].Q, 8)).T
        bias = 0 if site.bias is None else site.bias
        torch.testing.assert_close(y[..., site.rows], x @ weight.T + bias, atol=1e-9, rtol=1e-9)
    adapted.merge()
    for site, weight in expected.items():
        torch.testing.assert_close(site.weight, weight, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_lengths_and_angles_of_the_rows_stay():
    model = backbone("bert").double()
    before = peftlib.anatomy.of(model).layers[0].sites["attention.query"].weight.clone()
    adapted = peftlib.attach(model, "oft", block_size=16)
    model.double()
    perturb(adapted, std=2.0)
    adapted.merge()
    after = peftlib.anatomy.of(model).layers[0].sites["attention.query"].weight
    assert (after - before).norm() > 0.5 * before.norm()
    torch.testing.assert_close(after @ after.T, before @ before.T, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("terms", [4, 5, 6, 9])
@torch.no_grad()
def test_neumann_form(terms):
    """The published series. It is (I - Q^(terms - 1)) away from the rotation, and so useless for a large Q."""
    layer = Rotation(1, 6, terms).double()
    layer.Q.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    Q, one = skew(layer.Q[0], 6), torch.eye(6, dtype=torch.float64)
    R, exact = layer.R()[0], rotation(layer.Q, 6)
    torch.testing.assert_close(R, neumann(Q, terms), atol=1e-12, rtol=0)
    rest = torch.linalg.matrix_power(Q, terms - 1)
    torch.testing.assert_close(R, exact @ (one - rest), atol=1e-12, rtol=0)
    if terms % 2:
        torch.testing.assert_close(R @ R.T, (one - rest) @ (one - rest), atol=1e-12, rtol=0)
    layer.Q.mul_(10)
    assert torch.linalg.norm(layer.R()[0] @ layer.R()[0].T - one) > 10


def test_steps_are_those_of_the_authors_code():
    """Their layer has s^2 numbers P a block, Q = (P - P^T) / 2 and the weight (R' W^T)^T with R' = (I - Q)(I + Q)^-1.
    AdamW moves both alike, and SGD's steps on ours are twice as long."""
    generator = torch.Generator().manual_seed(0)
    W, x, goal = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (5, 7, 7))
    goal = goal[:, :5]
    for optimizer, factor in ((torch.optim.AdamW, 1.0), (torch.optim.SGD, 0.5)):
        layer = Rotation(2, 3).double()
        P = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
        steps = optimizer([layer.Q], lr=0.1 * factor, weight_decay=0), optimizer([P], lr=0.1, weight_decay=0)
        for _ in range(5):
            Q, one = (P - P.mT) / 2, torch.eye(3, dtype=torch.float64)
            blocks = torch.block_diag(*((one - q) @ torch.linalg.inv(one + q) for q in Q))
            theirs, mine = x @ (blocks @ W.T), layer(x) @ W.T
            torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-7)
            for y, step in zip((mine, theirs), steps):
                step.zero_grad()
                (y - goal).square().mean().backward()
                step.step()
        assert layer.Q.detach().abs().max() > 0.05


def _oracle(family, head, options, **more):
    task = {"classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM", "causal_lm": "CAUSAL_LM"}[head]
    targets = PARITY[family][1]
    pattern = ".*(" + "|".join(targets) + ")" if family == "bert" else targets
    config = peft.OFTConfig(task_type=task, oft_block_size=8, target_modules=pattern, **options)
    model = backbone(family, head)
    model._prepare_encoder_decoder_kwargs_for_generation = None  # HF peft asks for it; transformers 5 has none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config).eval()


def _batch(family, head):
    data = inputs(family)
    return data | {"decoder_input_ids": data["input_ids"]} if head == "seq2seq" else data


HEADS = {"bert": "classification", "llama": "causal_lm", "t5": "seq2seq"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", PARITY)
def test_parity_with_hf_peft(family, form):
    """The same rotations give the same logits, gradients and merged weights as HF peft's, and the same count."""
    head, (mine, theirs) = HEADS[family], FORMS[form]
    adapted = peftlib.attach(backbone(family, head), "oft", block_size=8, targets=PARITY[family][0], **mine)
    perturb(adapted, std=0.1)
    oracle = _oracle(family, head, theirs)
    assert sum(p.numel() for p in oracle.parameters() if p.requires_grad) == adapted.count().trained
    sign = -1 if "terms" in mine else 1  # HF peft's series is of -Q
    left = {n: p for n, p in oracle.named_parameters() if p.requires_grad}
    pairs = []
    for name, parameter in adapted.trainable().items():
        owner, _, last = name.partition(".")
        other = f"{owner}.modules_to_save.default.{last}" if name in adapted.head_names else ""
        other = other or name.replace("oft.Q", "oft_R.default.weight")
        pairs.append((parameter, left.pop(f"base_model.model.{other}"), 1 if name in adapted.head_names else sign))
    assert not left
    with torch.no_grad():
        for parameter, other, factor in pairs:
            other.copy_(factor * parameter)
    data = _batch(family, head)
    ours, reference = adapted.model(**data).logits, oracle(**data).logits
    torch.testing.assert_close(ours, reference, atol=1e-5 * float(reference.detach().abs().max()), rtol=1e-5)
    assert not torch.allclose(ours, backbone(family, head)(**data).logits, atol=1e-3)
    for model in (adapted.model, oracle):
        model(**data).logits.square().sum().backward()
    for parameter, other, factor in pairs:
        expected = factor * other.grad
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    merged, other = adapted.merge().state_dict(), oracle.merge_and_unload().state_dict()
    assert merged.keys() == other.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [*FORMS, "constrained"])
@pytest.mark.parametrize("family", PARITY)
def test_files_of_hf_peft(family, form, tmp_path):
    """Theirs into ours and back. HF peft constrains the blocks when it computes, and ours are constrained when read."""
    head, theirs = HEADS[family], FORMS.get(form, ({}, {"coft": True, "eps": 0.4}))[1]
    oracle, data = _oracle(family, head, theirs), _batch(family, head)
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    oracle.save_pretrained(tmp_path / "theirs")
    expected = logits(oracle, **data)
    adapted = peftlib.from_hf_peft(backbone(family, head), tmp_path / "theirs")
    tolerance = {"atol": 1e-5 * float(expected.abs().max()), "rtol": 0}
    torch.testing.assert_close(logits(adapted.model, **data), expected, **tolerance)
    assert not torch.allclose(expected, logits(backbone(family, head), **data), atol=1e-3)

    peftlib.to_hf_peft(adapted, tmp_path / "back")
    model = backbone(family, head)
    model._prepare_encoder_decoder_kwargs_for_generation = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="The cayley-neumann")
        again = peft.PeftModel.from_pretrained(model, tmp_path / "back").eval()
    torch.testing.assert_close(logits(again, **data), expected, **tolerance)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"module_dropout": 0.1}, "module_dropout"),
        ({"peft_version": "0.17.1"}, "0.17.1"),
        ({"peft_version": None}, "0.18"),
        ({"num_cayley_neumann_terms": 2}, "2 terms"),
    ],
)
def test_files_that_compute_something_else_are_refused(settings, match, tmp_path):
    _oracle("bert", "classification", {}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UnsupportedError, match=match):
        peftlib.from_hf_peft(backbone("bert"), tmp_path)


def test_files_with_blocks_of_several_sizes_are_refused(tmp_path):
    config = peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=0, r=4, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(backbone("llama", "causal_lm"), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"sizes \[8, 16\]"):
        peftlib.from_hf_peft(backbone("llama", "causal_lm"), tmp_path)


def test_no_file_of_hf_peft_for_gpt2(tmp_path):
    adapted = peftlib.attach(backbone("gpt2", "causal_lm"), "oft", block_size=8, targets=("attention.output",))
    with pytest.raises(UnsupportedError, match="Conv1D"):
        peftlib.to_hf_peft(adapted, tmp_path / "a")
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(backbone("gpt2", "causal_lm"), peft.OFTConfig(target_modules=["c_proj"], oft_block_size=8))


ATTENTION = ("attention.query", "attention.value")


@pytest.mark.parametrize(
    ("name", "options", "trained"),
    [
        ("roberta-base", {"targets": ATTENTION}, 285_696),
        ("llama-7b", {"targets": "all-linear"}, 17_649_664),
        ("llama-13b", {"targets": "all-linear"}, 27_617_280),
    ],
)
def test_published_counts(name, options, trained):
    adapted = peftlib.attach(
        backbones.shapes(name, head="causal_lm" if "llama" in name else "masked_lm"), "oft", **options
    )
    assert adapted.count().method == trained


def test_published_count_of_one_map():
    """128 inputs in 8 blocks."""
    assert Rotation(8, 128 // 8).Q.numel() == 960


def test_constraint():
    """After each step no block is outside of its ball, and without eps there is nothing to do in training."""
    free = peftlib.attach(backbone("bert"), "oft", block_size=8)
    bound = peftlib.attach(backbone("bert"), "oft", block_size=8, eps=0.2)
    assert free.method.hooks() == ()
    for adapted in (free, bound):
        train(adapted, batch("bert"), steps=4, rate=0.05)
    norms = {
        adapted: torch.stack(
            [skew(q, 8).norm() for update in adapted.method.updates.values() for q in update.Q.detach()]
        )
        for adapted in (free, bound)
    }
    radius = 0.2 / 4**0.5
    assert norms[free].min() > 2 * radius
    torch.testing.assert_close(norms[bound], torch.full_like(norms[bound], radius))


@torch.no_grad()
def test_constraint_is_hf_pefts():
    oracle = _oracle("bert", "classification", {"coft": True, "eps": 0.3, "use_cayley_neumann": False})
    layer = next(m for m in oracle.modules() if type(m).__name__ == "OFTRotationModule")
    mine = Rotation(len(layer.weight), 8)
    for std in (0.001, 0.5):
        mine.Q.normal_(std=std)
        expected = layer._project_batch(mine.Q.clone(), eps=0.3)
        mine.constrain(0.3 / len(mine.Q) ** 0.5)
        torch.testing.assert_close(mine.Q, expected)


@torch.no_grad()
def test_a_model_cast_to_half_precision():
    """The inverse is taken in float32 all the same."""
    model = backbone("bert")
    adapted = peftlib.attach(model, "oft", block_size=8)
    perturb(adapted)
    expected = logits(model, **inputs("bert"))
    got = logits(model.to(torch.bfloat16), **inputs("bert"))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("family", "options", "error", "match"),
    [
        ("bert", {"block_size": 7}, TargetError, "block_size=7 does not divide the 32 inputs of .*query"),
        ("bert", {"block_size": 1}, ConfigError, "block_size=1"),
        ("bert", {"terms": 3}, ConfigError, "terms=3"),
        ("bert", {"eps": -1.0}, ConfigError, "eps"),
        ("gpt2", {"targets": ATTENTION}, TargetError, "c_attn is 3 maps in one.*not attention.query, attention.value"),
    ],
)
def test_refused(family, options, error, match):
    model = backbone(family)
    with pytest.raises(error, match=match):
        peftlib.attach(model, "oft", **options)
    peftlib.attach(model, "oft", block_size=8)


# What is published

LAYER = "Zeju1997/oft, oft-db/oft_utils/attention_processor.py, OFTLinearLayer"
V2 = "arXiv:2506.19847 (OFTv2); read when the method was written"


def check_four_blocks():
    """``r=4``: each input is divided into four blocks, which ``block_size`` names by their size."""
    rotation = next(iter(tiny("oft", block_size=8).method.updates.values()))
    assert rotation.Q.shape == (32 // 8, 8 * 7 // 2)


FACTS = Facts(
    "oft",
    Default("block_size", 32, V2),
    Default("targets", ("*attention.*",), "Zeju1997/oft, oft-db/oft_utils/attention_processor.py: q, k, v and out"),
    Default("terms", 0, f"{LAYER}.cayley: the exact inverse"),
    Default("eps", 0.0, f"{LAYER}: is_coft=False"),
    Default("block_share", False, f"{LAYER}: block_share=False"),
    Start("*.oft.Q", zeros(), f"{LAYER}.__init__"),
    Trains(("*.oft.Q",), LAYER),
    Count("roberta-base", 48 * 24 * 496, "s (s - 1) / 2 a block: 24 blocks of 32 in 48 maps"),
    Count("t5-base", 144 * 24 * 496, "the same, with cross-attention"),
    Count("llama-7b", 128 * 128 * 496, "128 blocks of 32 in 128 maps"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
