"""AdaMix: what is drawn, what ties two passes together, and the one adapter that remains."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import peftlib
from peftlib import backbones
from peftlib.conformance.case import Case, batch, train
from peftlib.conformance.checks import CHECKS
from peftlib.errors import MergeError, TargetError, UnknownNameError
from peftlib.methods.base import ConfigError
from peftlib.methods.unified.adamix import Experts
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

SOUP = "microsoft/AdaMix, src/transformers/models/expert_soup.py"
GLUE = "microsoft/AdaMix, bert_base_mnli_expert_soup.sh"
NLG = "microsoft/AdaMix, NLG/run_train_e2e.sh"


def _defaults_of_the_lora_form():
    c = peftlib.config("adamix", form="lora")
    assert (c.rank, c.alpha, c.dropout, c.experts) == (4, 32.0, 0.1, 8)
    assert c.consistency == 100, "NLG/src/model.py, GPT2LMModel.forward: the consistency loss times 100"


FACTS = Facts(
    "adamix",
    Start("*.adamix.down.weight", normal(0.02), "BertPreTrainedModel._init_weights, of each expert by itself"),
    Start("*.adamix.up.weight", normal(0.02), "BertPreTrainedModel._init_weights"),
    Start("*.adamix.down.bias", zeros(), "BertPreTrainedModel._init_weights"),
    Start("*.adamix.B", zeros(), "microsoft/AdaMix, NLG/loralib/layers.py, reset_parameters", {"form": "lora"}),
    Trains(("*.output.dense.adamix.*",), "modeling_bert.py, BertOutput: ExpertSoup behind the feed-forward block"),
    Default("experts", 4, f"{GLUE}: --num_experts 4"),
    Default("bottleneck", 48, f"{GLUE}: --adapter_size 48"),
    Default("activation", "gelu", "modeling_bert.py, BertOutput: ExpertSoup(..., 'gelu')"),
    Default("consistency", 1.0, f"{GLUE}: --use_consistency_loss 1"),
    Default("dropout", 0.0, f"{SOUP}, ExpertSoup: none inside"),
    Holds("the defaults of the LoRA form", _defaults_of_the_lora_form, NLG),
    Count("roberta-base", 12 * (5 * 768 * 48 + 4 * 48 + 768), "--sharing_up 1, --sharing_down 0: 4 down, 1 up"),
    Count("t5-base", 24 * (5 * 768 * 48 + 4 * 48 + 768), "as on RoBERTa, 24 layers"),
    Count("llama-7b", 32 * (5 * 4096 * 48 + 4 * 48 + 4096), "as on RoBERTa, 32 layers of 4,096"),
    Count(
        "roberta-base",
        12 * 2 * 9 * 768 * 4,
        f"{NLG}: lora_dim 4, 8 experts, share_B; query and value",
        {"form": "lora"},
    ),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def sequential_adapter(y, W_down, b_down, W_up, b_up, activation="gelu"):
    """Houlsby et al. 2019: h + W_up act(W_down h + b_down) + b_up for a block's output h (tokens, d), in float64."""
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu}[activation]
    h, down, up = y.double(), W_down.double(), W_up.double()
    return (h + act(h @ down.T + b_down.double()) @ up.T + b_up.double()).to(y.dtype)


def attached(family="bert", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "adamix", **{"bottleneck": 6, **options})
    perturb(adapted)
    return adapted


def experts(adapted):
    return [m for m in adapted.model.modules() if isinstance(m, Experts)]


def test_every_pass_draws_one_expert_for_the_whole_batch_at_every_place():
    layer = Experts(5, 3, count=4, std=1.0)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(7, 2, 5)
    each = [F.linear(x, w, b) for w, b in zip(layer.weight, layer.bias)]
    seen = []
    for _ in range(60):
        y = layer(x)
        seen.append(next(i for i, expected in enumerate(each) if torch.allclose(y, expected, atol=1e-6)))
    assert set(seen) == {0, 1, 2, 3}
    other, drawn = Experts(5, 3, count=4, std=1.0), []
    for _ in range(40):
        layer(x).sum().backward()
        other(x).sum().backward()
        drawn.append(tuple(int(m.weight.grad.abs().sum((1, 2)).argmax()) for m in (layer, other)))
        layer.weight.grad = other.weight.grad = None
    assert any(a != b for a, b in drawn), "two places always draw the same"


@torch.no_grad()
def test_evaluation_uses_the_mean_weights_and_so_does_the_adapter_that_remains():
    adapted, given = attached(activation="gelu"), inputs("bert")
    site = adapted.host.anatomy.layers[1].sites["ffn.down"]
    child = site.module.adamix
    mean = child.down.weight.mean(dim=0), child.down.bias.mean(dim=0)
    spy = Spy(site.module)
    before = adapted.model.eval()(**given).logits
    x, y = spy[site.module]
    expected = sequential_adapter(linear(site, x).reshape(-1, 32), *mean, child.up.weight, child.up.bias)
    torch.testing.assert_close(y.reshape(expected.shape), expected, atol=2e-5, rtol=1e-4)
    adapted.method.on_train_end()
    assert child.down.weight.shape == (6, 32)
    assert torch.equal(adapted.model(**given).logits, before)


def test_the_remaining_one_costs_what_one_adapter_costs():
    adapted = peftlib.attach(backbones.shapes("roberta-base"), "adamix", bottleneck=16)
    one = 12 * (2 * 768 * 16 + 16 + 768)
    assert adapted.count().method == one + 12 * 3 * (768 * 16 + 16)
    assert adapted.count().stored - adapted.count().head == one
    adapted.method.on_train_end()
    assert adapted.count().method == one


def _symmetric(p, q):
    """KL(p || q) + KL(q || p), term by term."""
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log() + q * (q / p).log()).sum(-1)


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "causal_lm"), ("t5", "seq2seq")])
def test_the_loss_is_that_of_the_first_pass_and_half_the_symmetric_divergence_of_two(family, head):
    adapted, data = attached(family, head, consistency=3.0), batch(family, head)
    passes = []
    plain = type(adapted.model).forward

    def forward(**kwargs):
        passes.append(plain(adapted.model, **kwargs))
        return passes[-1].__class__(loss=passes[-1].loss, logits=passes[-1].logits)

    adapted.model.forward.own = forward
    adapted.model.train()
    torch.manual_seed(0)  # one draw in sixteen gives both passes the same experts
    with adapted.lifecycle(1):
        total = adapted.model(**data).loss
    assert len(passes) == 2
    assert not torch.equal(passes[0].logits, passes[1].logits)
    rows, labels = _symmetric(*(p.logits.detach().double() for p in passes)), data["labels"]
    if head == "causal_lm":
        rows, labels = rows[:, :-1], labels[:, 1:]
    if head != "classification":
        rows = rows[labels != -100]
    assert float(total.detach()) == pytest.approx(
        float(passes[0].loss.detach()) + 3.0 / 2 * float(rows.mean()), rel=1e-5
    )


def test_the_targets_of_the_divergence_have_no_gradient():
    """Of KL(p || q) + KL(q || p), q gets softmax(q) - p from the first and p likewise from the second."""
    adapted, data = attached(consistency=2.0), batch("bert")
    adapted.model.train()
    seen, original = [], adapted.method._log_probabilities

    def keep(logits):
        logits.retain_grad()
        seen.append(logits)
        return original(logits)

    adapted.method._log_probabilities = keep
    with adapted.lifecycle(1):
        out = adapted.model(**data)
        (out.loss - F.cross_entropy(out.logits, data["labels"])).backward()
    p, q = (t.detach().softmax(-1) for t in seen)
    rows = len(data["labels"])
    assert torch.allclose(seen[0].grad, (p - q) / rows, atol=1e-6)
    assert torch.allclose(seen[1].grad, (q - p) / rows, atol=1e-6)


def test_without_the_loss_there_is_one_pass():
    adapted, calls = attached(consistency=0.0), []
    adapted.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    adapted.model.train()
    with adapted.lifecycle(1):
        adapted.model(**batch("bert"))
    assert len(calls) == 1


def test_a_file_saved_in_the_middle_holds_the_mean_and_trains_on(tmp_path):
    adapted = attached()
    given = inputs("bert")
    before = adapted.model.eval()(**given).logits
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "a"))
    assert torch.equal(loaded.model.eval()(**given).logits, before)
    assert experts(adapted)[0].count == 4
    assert {e.count for e in experts(loaded)} == {1}
    losses = train(loaded, batch("bert"), steps=4, rate=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_lora_form_starts_as_the_identity_and_merges_to_the_mean(family):
    plain = backbone(family)
    start = peftlib.attach(backbone(family), "adamix", form="lora")
    assert torch.equal(start.model(**inputs(family)).logits, plain(**inputs(family)).logits)
    adapted = attached(family, form="lora", alpha=6.0)
    d = adapted.host.anatomy.d
    assert adapted.count().method == 2 * 2 * (8 + 1) * d * 4
    site = adapted.host.anatomy.sites(("attention.value",))[0]
    child = next(c for s, c in adapted.method.updates.items() if str(s) == str(site))
    weight = site.weight.detach() + 6.0 / 4 * child.B.detach() @ child.experts.weight.detach().mean(0)
    before = adapted.model.eval()(**inputs(family)).logits
    merged = adapted.merge()
    torch.testing.assert_close(site.weight.detach(), weight)
    torch.testing.assert_close(merged(**inputs(family)).logits, before, atol=1e-5, rtol=1e-4)


def test_the_lora_form_starts_from_copies_of_one_matrix():
    for child in peftlib.attach(backbone("bert"), "adamix", form="lora").method.updates.values():
        assert float(child.experts.weight.std()) > 0.05
        assert all(torch.equal(A, child.experts.weight[0]) for A in child.experts.weight)


@pytest.mark.parametrize(
    ("family", "head", "blocks"), [("gpt2", "causal_lm", 2), ("bert", "masked_lm", 2), ("t5", "seq2seq", 6)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_query_and_value_of_an_attention_share_a_draw(family, head, blocks, checkpointing):
    """One AdamixMergedLinear makes query and value in the authors' code. Which expert had a gradient shows the draw."""
    adapted = peftlib.attach(backbone(family, head), "adamix", form="lora", consistency=0.0)
    perturb(adapted)
    if checkpointing:
        adapted.model.gradient_checkpointing_enable()
    adapted.model.train()
    children = {str(site): child for site, child in adapted.method.updates.items()}
    drawn = []
    for _ in range(12):
        with adapted.lifecycle(1):
            adapted.method.on_train_end = lambda: None
            adapted.model(**batch(family, head)).loss.backward()
        used = {}
        for name, child in children.items():
            hit = child.experts.weight.grad.abs().sum((1, 2)).nonzero().flatten().tolist()
            assert len(hit) == 1, "each map draws one expert for the whole batch"
            used.setdefault(name.rpartition(".")[0], set()).update(hit)
            child.experts.weight.grad = None
        assert len(used) == blocks
        assert all(len(experts) == 1 for experts in used.values()), "query and value differ"
        drawn.append([next(iter(experts)) for experts in used.values()])
    assert len({tuple(d) for d in drawn}) > 1
    assert any(len(set(d)) > 1 for d in drawn), "two attentions always draw the same"


def test_maps_that_are_no_query_key_or_value_draw_for_themselves():
    adapted = attached(form="lora", targets=("attention.query", "attention.output", "ffn.up"))
    assert [child.experts.shared for child in adapted.method.updates.values()] == [None] * 6


@dataclass(frozen=True)
class LoRAForm(Case):
    @property
    def config(self):
        return peftlib.config("adamix", form="lora", dropout=0.0)  # two runs of the same steps are compared


@pytest.mark.parametrize("name", ["moves", "gradients", "save_load", "bf16_backbone", "checkpointing", "deepcopy"])
def test_the_lora_form_keeps_the_promises_too(name, tmp_path):
    CHECKS[name].run(LoRAForm("adamix", "bert"), tmp_path)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="experts=1"):
        peftlib.config("adamix", experts=1)
    with pytest.raises(ConfigError, match=r"consistency=-1\.0"):
        peftlib.config("adamix", consistency=-1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'adapter'"):
        peftlib.config("adamix", form="adaptor")
    with pytest.raises(TargetError, match="rank 33 does not fit"):
        attached(form="lora", rank=33)
    with pytest.raises(MergeError, match="adamix has no merge"):
        attached().merge()
