"""ProPETL: one prototype, masks by the largest scores, bits on disk; its three forms against plain formulas."""

from dataclasses import dataclass

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import peftlib
from peftlib import anatomy, backbones
from peftlib.conformance.case import LABELS, Case, batch, train
from peftlib.conformance.checks import CHECKS
from peftlib.errors import DataError, LoadError, MergeError, TargetError, UnknownNameError
from peftlib.methods.base import ConfigError
from peftlib.methods.unified.propetl.layer import TopMask
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, normal, uniform, zeros
from tests.methods.helpers import Spy, backbone, inputs, linear, perturb

FORMS = {
    "adapter": {"form": "adapter", "bottleneck": 6},
    "prefix": {"form": "prefix", "length": 5, "hidden": 7, "keep": 0.4},
    "lora": {"form": "lora", "rank": 4, "alpha": 6.0, "keep": 0.3},
}


def attached(family, form="adapter", head="classification", **options):
    adapted = peftlib.attach(backbone(family, head), "propetl", **(FORMS[form] | options))
    perturb(adapted)
    return adapted


@torch.no_grad()
def logits(model, family):
    given = inputs(family)
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    return model.eval()(**given).logits


def kept(scores, share):
    """The literal rule of the reference code: sort, zero the lowest floor((1 - share) n)."""
    mask = torch.ones(scores.numel())
    mask[scores.detach().abs().flatten().argsort()[: int((1 - share) * scores.numel())]] = 0
    return mask.view(scores.shape)


# The mask


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.999, 1.0])
def test_a_mask_keeps_the_largest_scores_and_passes_gradients_to_them(share):
    torch.manual_seed(0)
    mask, tensor, weight = TopMask((7, 13), share), torch.randn(7, 13), torch.randn(7, 13)
    expected = kept(mask.scores, share)
    assert torch.equal(mask(tensor), tensor * expected)
    (mask(tensor) * weight).sum().backward()
    assert torch.allclose(mask.scores.grad, tensor * weight * mask.scores.detach().sign())
    assert mask.scores.detach().abs().max() <= 1 / 13**0.5


def test_a_gradient_step_can_bring_an_entry_back():
    mask = TopMask((1, 4), 0.5)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert mask.mask().tolist() == [[True, True, False, False]]
    tensor = torch.ones(1, 4)
    (mask(tensor) * torch.tensor([[0.0, 1.0, 0.0, -1.0]])).sum().backward()
    with torch.no_grad():
        mask.scores -= 0.25 * mask.scores.grad
    assert mask.mask().tolist() == [[True, False, False, True]]


# The forms


@pytest.mark.parametrize("family", ["bert", "distilbert", "bart"])
def test_the_adapter_reads_behind_the_norm_and_adds_before_it(family):
    adapted = attached(family)
    layer = anatomy.of(adapted.model).layers[1]
    norm, child = layer.norms["ffn"], layer.module.propetl
    seen = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()), prepend=True)
    spy = Spy(norm)
    logits(adapted.model, family)
    p, z = child.prototype, seen[0]
    down, up = (kept(child.masks[name].scores, 0.5) for name in ("down", "up"))
    reads = F.layer_norm(z, z.shape[-1:], norm.weight, norm.bias, norm.eps)
    inner = torch.relu(reads @ (p.down.weight * down).T + p.down.bias)
    expected = z + inner @ (p.up.weight * up).T + p.up.bias
    assert torch.allclose(spy[norm][0], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_the_adapter_stands_behind_the_residual_sum_of_pre_norm_layers(family):
    adapted = attached(family)
    first, second = anatomy.of(adapted.model).layers[:2]
    given, child = [], first.module.propetl
    first.module.register_forward_hook(
        lambda module, args, output: given.append(output[0] if isinstance(output, tuple) else output), prepend=True
    )
    received = []
    second.module.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    logits(adapted.model, family)
    p, h = child.prototype, given[0]
    down, up = (kept(child.masks[name].scores, 0.5) for name in ("down", "up"))
    inner = torch.relu(h @ (p.down.weight * down).T + p.down.bias)
    assert torch.allclose(received[0], h + inner @ (p.up.weight * up).T + p.up.bias, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_lora_is_a_masked_low_rank_update_and_merges_exactly(family):
    adapted = attached(family, "lora")
    site = anatomy.of(adapted.model).sites(("attention.value",))[1]
    child = adapted.method.updates[next(s for s in adapted.method.updates if str(s) == str(site))]
    spy = Spy(site.module)
    before = logits(adapted.model, family)
    A, B = (getattr(child.prototype, n) * kept(child.masks[n].scores, 0.3) for n in "AB")
    x, y = spy[site.module]
    assert torch.allclose(y[..., site.rows], linear(site, x) + 6.0 / 4 * x @ A.T @ B.T, atol=1e-5)
    merged = adapted.merge()
    assert not any("propetl" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged, family), before, atol=1e-5, rtol=1e-5)


def test_the_prefix_is_a_masked_table_of_keys_and_values():
    adapted = attached("bert", "prefix")
    first, second = (layer.attention.propetl for layer in anatomy.of(adapted.model).layers)
    maker = first.maker.prototype.maker
    assert second.maker.prototype.maker is maker
    hidden = torch.tanh(maker.trunk.embedding @ maker.trunk.linear.weight.T + maker.trunk.linear.bias)
    table = hidden @ maker.linear.weight.T + maker.linear.bias
    for prefix in (first, second):
        masked = table * kept(prefix.maker.masks["table"].scores, 0.4)
        for got, expected in zip(prefix.pair(), masked.chunk(2, dim=1), strict=True):
            assert torch.allclose(got, expected.view(5, 4, 8).transpose(0, 1), atol=1e-6)


# What is shared, trained and stored


@pytest.mark.parametrize(
    ("family", "form", "prototypes"),
    [
        ("bert", "adapter", 1),
        ("bert", "lora", 2),
        ("t5", "adapter", 1),
        ("t5", "lora", 4),
        ("t5", "prefix", 3),
        ("bart", "adapter", 1),
        ("llama", "lora", 2),
    ],
)
def test_layers_share_prototypes_and_have_masks_of_their_own(family, form, prototypes):
    adapted = attached(family, form)
    assert len(adapted.method.prototypes) == prototypes
    masks = {n: m for n, m in adapted.model.named_modules() if isinstance(m, TopMask)}
    assert len({id(m.scores) for m in masks.values()}) == len(masks)
    names = [n for n in adapted.trainable() if "propetl" in n and "scores" not in n]
    assert len({n.split(".propetl.")[0] for n in names}) == prototypes


def test_encoder_and_decoder_can_have_their_own():
    assert len(attached("t5", share_stacks=False).method.prototypes) == 2
    assert len(attached("t5", "lora", share_stacks=False).method.prototypes) == 6


def test_counts_on_roberta_base():
    d, layers = 768, 12
    expected = {
        "adapter": (13 * 2 * d * 64 + 64 + d, 2 * d * 64 + 64 + d, layers * 2 * d * 64),
        "lora": (13 * 2 * 2 * d * 32, 2 * 2 * d * 32, layers * 2 * 2 * d * 32),
        "prefix": (64 * d + 769 * 512 + 2 * d * 513 + layers * 2 * 64 * d, 2 * 64 * d, layers * 2 * 64 * d),
    }
    for form, (trained, dense, bits) in expected.items():
        adapted = peftlib.attach(backbones.shapes("roberta-base", head="classification"), "propetl", form=form)
        count = adapted.count()
        assert count.method == trained
        assert count.stored_bytes - 4 * count.head == 4 * dense + bits // 8


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_is_one_prototype_and_one_bit_a_score(family, form, tmp_path):
    adapted = attached(family, form)
    before = logits(adapted.model, family)
    scores = sum(m.scores.numel() for m in adapted.model.modules() if isinstance(m, TopMask))
    folder = adapted.save(tmp_path / "a")
    stored = safetensors.torch.load_file(folder / "adapter.safetensors")
    bits = {n: t for n, t in stored.items() if t.dtype == torch.uint8}
    assert sum(t.numel() for t in bits.values()) == scores / 8
    dense = {
        "adapter": 2 * 32 * 6 + 6 + 32,
        "prefix": (3 if family == "t5" else 1) * 2 * 5 * (16 if family == "llama" else 32),
        "lora": {"bert": 2, "t5": 4}.get(family, 0) * 2 * 32 * 4 + (family == "llama") * 4 * (32 + 32 + 32 + 16),
    }[form] + adapted.count().head
    assert sum(t.numel() for n, t in stored.items() if n not in bits) == dense
    size = (folder / "adapter.safetensors").stat().st_size
    header = int.from_bytes((folder / "adapter.safetensors").read_bytes()[:8], "little")
    assert size == 8 + header + 4 * dense + scores // 8

    loaded = peftlib.load(backbone(family), folder)
    assert torch.equal(logits(loaded.model, family), before)
    assert not any("scores" in n for n in loaded.trainable())
    labels = torch.tensor([0, 1, 0])
    loaded.model(**inputs(family), labels=labels).loss.backward()
    assert all(p.grad is not None for p in loaded.trainable().values())
    assert loaded.method.learning_rates() == {}
    again = peftlib.load(backbone(family), loaded.save(tmp_path / "b"))
    assert torch.equal(logits(again.model, family), before)


def test_scores_train_at_their_own_rate():
    for form, factor in (("adapter", 30), ("lora", 300), ("prefix", 1)):
        adapted = attached("bert", form)
        rates = {id(p): g["lr"] for g in adapted.parameter_groups(1e-4) for p in g["params"]}
        for name, parameter in adapted.trainable().items():
            assert rates[id(parameter)] == pytest.approx(1e-4 * (factor if name.endswith(".scores") else 1))
    adapted = attached("bert", mask_rate=2.0)
    assert set(adapted.method.learning_rates().values()) == {2.0}
    assert len(adapted.method.learning_rates()) == 4


@pytest.mark.parametrize("form", ["adapter", "prefix", "lora"])
def test_a_file_of_other_sizes_is_refused(form):
    other = {"adapter": {"bottleneck": 7}, "prefix": {"length": 6}, "lora": {"rank": 5}}[form]
    with pytest.raises(LoadError, match="mask of shape"):
        attached("bert", form).method.load_state(attached("bert", form, **other).method.state())
    with pytest.raises(LoadError, match="missing or left over"):
        attached("bert", form).method.load_state({})


# Masks of tasks

COMBINED = {
    "or": lambda layer, task: ((layer + task) > 0).float(),
    "and": lambda layer, task: ((layer + task) == 2).float(),
    "add": lambda layer, task: layer + task,
}


@pytest.mark.parametrize("combine", COMBINED)
def test_a_row_is_served_by_the_layer_s_mask_and_its_task_s(combine):
    adapted = attached("bert", tasks=2, combine=combine)
    layers = [layer.module.propetl for layer in anatomy.of(adapted.model).layers]
    assert layers[0].task_masks is layers[1].task_masks
    child, z = layers[1], torch.randn(3, 5, 32)
    p, tasks = child.prototype, [1, 0, 1]
    adapted.host.tasks.enter(torch.tensor(tasks))
    got = child.delta(z)
    for row, task in enumerate(tasks):
        down, up = (
            COMBINED[combine](kept(child.masks[n].scores, 0.5), kept(child.task_masks.masks[n][task].scores, 0.5))
            for n in ("down", "up")
        )
        inner = torch.relu(z[row] @ (p.down.weight * down).T + p.down.bias)
        torch.testing.assert_close(got[row], inner @ (p.up.weight * up).T + p.up.bias)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_batch_is_each_task_alone(family, form):
    adapted = attached(family, form, tasks=3)
    data, tasks = inputs(family), torch.tensor([2, 0, 2])

    @torch.no_grad()
    def answer(**more):
        extra = {"decoder_input_ids": data["input_ids"]} if family == "t5" else {}
        return adapted.model.eval()(**data, **extra, **more).logits

    mixed, alone = answer(task_ids=tasks), []
    for task in range(3):
        with adapted.task(task):
            alone.append(answer())
    assert not torch.allclose(alone[0], alone[2], atol=1e-4)
    torch.testing.assert_close(mixed, torch.stack([alone[t][row] for row, t in enumerate(tasks)]))
    with pytest.raises(DataError, match="task 3 is not one of this adapter's tasks, 0 to 2"):
        answer(task_ids=torch.tensor([0, 3, 0]))


def test_opposite_tasks_are_told_apart_by_their_masks():
    """Two tasks with the same texts and opposite labels, which nothing but the masks of tasks can tell apart."""
    adapted = peftlib.attach(backbone("bert"), "propetl", bottleneck=32, tasks=2, std=0.2)
    data = {k: torch.cat([v, v]) for k, v in batch("bert").items()}
    data["labels"][len(LABELS) :] = 1 - data["labels"][len(LABELS) :]
    data["task_ids"] = torch.arange(2).repeat_interleave(len(LABELS))
    before = {n: p.detach().clone() for n, p in adapted.trainable().items() if "task_masks" in n}
    losses = train(adapted, data, steps=150, rate=5e-3)
    assert losses[-1] < 0.3 < losses[0]
    assert all(not torch.equal(before[n], p) for n, p in adapted.trainable().items() if n in before)


@pytest.mark.parametrize("form", FORMS)
def test_tasks_are_stored_as_bits_and_one_can_be_kept(form, tmp_path):
    plain, adapted = attached("bert", form), attached("bert", form, tasks=3)
    places = sum(m.scores.numel() for m in plain.model.modules() if isinstance(m, TopMask)) // len(
        anatomy.of(plain.model).layers
    )
    assert adapted.count().method - plain.count().method == 3 * places
    assert adapted.count().stored_bytes - plain.count().stored_bytes == 3 * places // 8
    with adapted.task(1):
        expected = logits(adapted.model, "bert")
    loaded = peftlib.load(backbone("bert"), adapted.save(tmp_path / "all"))
    with loaded.task(1):
        assert torch.equal(logits(loaded.model, "bert"), expected)
    loaded.method.keep(1)
    assert torch.equal(logits(loaded.model, "bert"), expected)
    again = peftlib.load(backbone("bert"), loaded.save(tmp_path / "one"))
    assert again.method.tasks == 1
    assert torch.equal(logits(again.model, "bert"), expected)
    with pytest.raises(ConfigError, match="task 3 is not here"):
        adapted.method.keep(3)
    if form == "lora":
        with pytest.raises(MergeError, match="a mask for each of its 3 tasks"):
            adapted.merge()
        again.merge()
        torch.testing.assert_close(logits(again.model, "bert"), expected, atol=1e-5, rtol=1e-5)


# What every method must do, for the forms that are not the default


@dataclass(frozen=True)
class FormCase(Case):
    form: str = ""

    @property
    def config(self):
        # Wide enough for what is remembered of eight texts to pass through the layers' shares of it.
        return peftlib.config("propetl", **FORMS[self.form] | {"length": 20, "hidden": 32})


PROMISES = (
    *("moves", "gradients", "frozen", "overfits", "save_load", "detach", "padding", "generate"),
    *("autocast", "bf16_backbone", "checkpointing", "deepcopy", "compiles"),
)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("form", ["prefix", "lora"])
@pytest.mark.parametrize("name", PROMISES)
def test_the_other_forms_keep_the_promises_too(name, form, family, tmp_path):
    head = CHECKS[name].case("propetl", family).head
    if name == "generate" and family == "bert":
        return
    if name == "compiles" and family != "bert":
        return
    CHECKS[name].run(FormCase("propetl", family, head, form), tmp_path)


def test_lora_starts_as_the_identity():
    plain = logits(backbone("bert"), "bert")
    adapted = peftlib.attach(backbone("bert"), "propetl", **FORMS["lora"])
    assert torch.equal(logits(adapted.model, "bert"), plain)


def test_what_cannot_be_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'lora'"):
        peftlib.config("propetl", form="Lora")
    with pytest.raises(ConfigError, match="keep=0"):
        peftlib.config("propetl", keep=0.0)
    with pytest.raises(ConfigError, match=r"keep=1\.5"):
        peftlib.config("propetl", keep=1.5)
    with pytest.raises(ConfigError, match="mask_rate"):
        peftlib.config("propetl", mask_rate=-1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'and'"):
        peftlib.config("propetl", combine="nd")
    with pytest.raises(UnknownNameError, match="activation"):
        peftlib.config("propetl", activation="relux")
    with pytest.raises(TargetError, match="rank 33 does not fit"):
        attached("bert", "lora", rank=33)
    for form in ("adapter", "prefix"):
        with pytest.raises(MergeError, match="propetl has no merge"):
            attached("bert", form).merge()


def _rates_and_shares():
    """scripts/run_adapter.sh, run_lora.sh, run_prefix.sh: sparsity and mask_lr / learning_rate."""
    for form, share, rate in (("adapter", 0.5, 30.0), ("lora", 0.1, 300.0), ("prefix", 0.1, 1.0)):
        adapted = attached("bert", form, keep=None)
        assert adapted.config.share == share
        assert set(adapted.method.learning_rates().values()) == {rate}


CODE = "ChaosCodes/ProPETL, propetl-roberta"
MASKS = f"{CODE}, adapters/modeling.py"
FACTS = Facts(
    "propetl",
    Default("form", "adapter", "section 4; one of its three"),
    Default("bottleneck", 64, f"{CODE}, scripts/run_adapter.sh: adapter_reduction_factor=12 of 768"),
    Default("activation", "relu", f"{CODE}, scripts/run_adapter.sh: pfeiffer"),
    Default("std", 0.02, f"{MASKS}, init_bert_weights"),
    Default("length", 64, f"{CODE}, scripts/run_prefix.sh"),
    Default("rank", 32, f"{CODE}, scripts/run_lora.sh"),
    Default("alpha", 48.0, f"{CODE}, scripts/run_lora.sh"),
    Default("combine", "or", "ChaosCodes/ProPETL, propetl-t5/configs/glue: mask_extreme_mode_combine_method"),
    Holds("shares that are kept and rates of the scores", _rates_and_shares, f"{CODE}, scripts"),
    Start("*.prototype.down.weight", normal(0.02), f"{MASKS}, init_bert_weights", {"bottleneck": 128}),
    Start("*.prototype.up.weight", normal(0.02), f"{MASKS}, init_bert_weights", {"bottleneck": 128}),
    Start("*.prototype.*.bias", zeros(), f"{MASKS}, init_bert_weights"),
    Start("*.masks.down.scores", uniform(64**-0.5), f"{MASKS}, AdapterSubnet: (d, r), so 1 / sqrt(r); 0.125 at r = 64"),
    Start("*.masks.up.scores", uniform(32**-0.5), f"{MASKS}, AdapterSubnet: (r, d), so 1 / sqrt(d); 0.036 at d = 768"),
    Start(
        "*.masks.table.scores",
        uniform((20 * 2 * 32) ** -0.5),
        f"{MASKS}, PrefixSubnet: (layers, m, 2 d), so 1 / sqrt(2 m d); 0.0032 at m = 64, d = 768",
        {"form": "prefix", "length": 20, "hidden": 16},
    ),
    Start("*.masks.A.scores", uniform(32**-0.5), f"{MASKS}, LoraSubnet: (r, d)", {"form": "lora", "rank": 16}),
    Start("*.masks.B.scores", uniform(16**-0.5), f"{MASKS}, LoraSubnet: (d, r)", {"form": "lora", "rank": 16}),
    Trains(("*.prototype.*", "*.masks.*.scores"), f"{CODE}: the shared adapter and the masks of all layers"),
    Count("roberta-base", 1_278_784, "section 3.2: a prototype and scores of its size in 12 layers"),
    Count("t5-base", 2_458_432, "the same, one prototype for both stacks as in propetl-t5"),
    Count("llama-7b", 17_305_664, "the same formula"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
