"""LoRAPrune: its scores and schedule, the exact target, the masked model against the cut one, smaller weights and fewer
operations, files, and merged models that transformers builds by itself."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import peftlib
from peftlib.conformance.case import batch, train
from peftlib.errors import LoadError, PeftlibError, TargetError, UnsupportedError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, zeros
from tests.methods.helpers import backbone, inputs, perturb

CODE = "aim-uofa/LoRAPrune, prune.py, train"

FACTS = Facts(
    "lora_prune",
    Start("*.lora.A", kaiming_uniform(), "aim-uofa/LoRAPrune, loraprune/lora.py, reset_parameters"),
    Start("*.lora.B", zeros(), "aim-uofa/LoRAPrune, loraprune/lora.py, reset_parameters"),
    Trains(("*.lora.A", "*.lora.B"), "aim-uofa/LoRAPrune, script/prune.sh: all seven maps"),
    Default("ratio", 0.5, f"{CODE}: ratio"),
    Default("criterion", "absolute", "aim-uofa/LoRAPrune, loraprune/utils.py, compute_sensitivity"),
    Default("rank", 8, f"{CODE}: lora_r"),
    Default("alpha", 16.0, f"{CODE}: lora_alpha"),
    Default("dropout", 0.05, f"{CODE}: lora_dropout"),
    Default("warmup", 0.1, f"{CODE}: warmup_iters"),
    Default("cooldown", 0.1, f"{CODE}: cooldown_iters"),
    Default("interval", 10, f"{CODE}: prune_freq"),
    Default("beta", 0.9, "aim-uofa/LoRAPrune, loraprune/utils.py, update_sensitivity_dict"),
    Default("spare_first", 0.1, "aim-uofa/LoRAPrune, loraprune/utils.py, freeze"),
    Default("spare_last", 1, "aim-uofa/LoRAPrune, loraprune/utils.py, freeze"),
    Count("roberta-base", 1_327_104, "12 x 8 x (8 x 768 + 2 x (768 + 3,072))"),
    Count("t5-base", 3_244_032, "8 x (12 x 13,824 + 12 x 19,968): 4 or 8 maps of 768 x 768, 2 of 768 x 3,072"),
    Count("llama-7b", 19_988_480, "32 x 8 x (8 x 4,096 + 3 x (4,096 + 11,008))"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()


def _attached(family: str, head: str = "classification", **options) -> peftlib.Adapted:
    adapted = peftlib.attach(
        backbone(family, head), "lora_prune", **{"spare_last": 0, "interval": 1, "dropout": 0.0, **options}
    )
    perturb(adapted, std=0.1)
    return adapted


def _mask(adapted: peftlib.Adapted) -> None:
    """Other units in every block: the first, third, ... of one and the second, fourth, ... of the next."""
    for index, block in enumerate(adapted.method.blocks):
        block.kept[index % 2 :: 2] = False


def _numbers(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    return model(**inputs(family)).logits


def _score(method, block, criterion: str) -> torch.Tensor:
    """s of each unit of one block, unit by unit, in float64: of the code (compute_sensitivity in loraprune/utils.py)
    absolute values with a norm of one for each map, of the paper squares."""
    s = torch.zeros(len(block.kept), dtype=torch.float64)
    for site in (*block.into, block.out):
        u = method.updates[site]
        W, A, B, g_A, g_B = (t.detach().double() for t in (site.weight, u.A, u.B, u.A.grad, u.B.grad))
        G = g_B @ A + B @ g_A - g_B @ g_A
        product = G * (W + u.scale * B @ A)
        of_units = product.chunk(len(s), dim=int(site is block.out))
        if criterion == "squared":
            s += torch.stack([(entries**2).sum() for entries in of_units])
        else:
            importance = torch.stack([entries.abs().sum() for entries in of_units])
            s += importance / importance.norm()
    return s


def _share(step, total, ratio, warmup, cooldown):
    """The cubic schedule; ``step`` counts finished steps from 1."""
    if step <= warmup:
        return 0.0
    if step >= total - cooldown:
        return ratio
    left = (total - cooldown - step) / (total - cooldown - warmup)
    return ratio - ratio * left**3


@pytest.mark.parametrize("criterion", ["absolute", "squared"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_scores_are_those_of_the_code_or_of_the_paper(family, criterion):
    """With packed and transposed maps, and with queries that share a head of keys and values, too."""
    adapted = _attached(family, rank=2, criterion=criterion)
    method, found = adapted.method, []
    adapted.model.train()
    with adapted.lifecycle(30) as life:
        for _ in range(2):
            life.step_start()
            adapted.model(**batch(family)).loss.backward()
            found.append({block.name: _score(method, block, criterion) for block in method.blocks})
            life.gradients()
            perturb(adapted, std=0.05, seed=3)
            life.step_end()
        for block in method.blocks:
            units = adapted.host.anatomy.kv_heads if block.kind == "attention" else 64
            first, second = (f[block.name] for f in found)
            assert len(first) == units
            expected = 0.09 * first + 0.1 * second
            torch.testing.assert_close(method.scores[block.name].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_two_criteria_prune_other_units():
    gone = {}
    for criterion in ("absolute", "squared"):
        adapted = _attached("bert", criterion=criterion)
        train(adapted, batch("bert"), 3, rate=1e-3)
        gone[criterion] = adapted.method.gone()
    assert gone["absolute"] != gone["squared"]
    common = [len({*gone["absolute"][n]} & {*gone["squared"][n]}) / len(gone["absolute"][n]) for n in gone["absolute"]]
    assert sum(common) / len(common) > 0.5, "they do not differ in everything"


def test_schedule_and_exact_target():
    """Nothing goes in the warm-up, what is gone stays gone, exactly the target is, and the spared layer is whole."""
    total = 30
    adapted = _attached("bert", ratio=0.4, spare_last=1, interval=4)
    method, seen = adapted.method, []
    train(adapted, batch("bert"), total, rate=1e-3, watch=[lambda step: seen.append(method.gone())])
    assert list(method.gone()) == ["encoder.0.attention", "encoder.0.ffn"]
    for step, gone in enumerate(seen):
        at = step if step >= total - 3 else step - step % 4
        share = _share(at, total, 0.4, 3, 3)
        assert {n: len(units) for n, units in gone.items()} == {
            "encoder.0.attention": int(4 * share + 1e-9),
            "encoder.0.ffn": int(64 * share + 1e-9),
        }
    for before, after in zip(seen, [*seen[1:], method.gone()]):
        assert all(set(before[n]) <= set(after[n]) for n in before)
    assert [len(units) for units in method.gone().values()] == [1, 25]
    shapes = [tuple(p.shape) for n, p in adapted.model.named_parameters() if n.endswith("query.weight")]
    assert shapes == [(24, 32), (32, 32)]


def test_the_lowest_scores_go_and_a_training_that_ends_early_reaches_the_target():
    adapted = _attached("llama")
    scores: dict = {}
    watch = [lambda step: scores.update({n: s.clone() for n, s in adapted.method.scores.items()})]
    train(adapted, batch("llama"), 2, total=100, watch=watch)
    for block in adapted.method.blocks:
        assert len(block.gone) == len(block.kept) // 2
        assert scores[block.name][block.gone].max() <= scores[block.name][block.kept].min()
    left = adapted.method.gone()
    train(adapted, batch("llama"), 3)  # goes on with the smaller model
    assert adapted.method.gone() == left


def test_a_step_without_finite_gradients_is_left_out():
    adapted = _attached("bert")
    adapted.model.train()
    with adapted.lifecycle(30) as life:
        for poison in (False, True):
            life.step_start()
            adapted.model(**batch("bert")).loss.backward()
            if poison:
                before = {n: s.clone() for n, s in adapted.method.scores.items()}
                next(iter(adapted.method.updates.values())).B.grad[0, 0] = torch.inf
            life.gradients()
            life.step_end()
        assert all(torch.equal(s, before[n]) for n, s in adapted.method.scores.items())


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "opt", "llama", "t5", "mt5", "bart"])
def test_the_masked_model_is_the_cut_one(family):
    """In float64, in evaluation and in the gradients of what is left, with other units gone in every block."""
    adapted = _attached(family)
    model = adapted.model.double()
    _mask(adapted)
    whole, data = _numbers(model), batch(family)
    found = []
    for _ in range(2):
        model.zero_grad()
        output = model(**data)
        output.loss.backward()
        found.append((output.logits.detach(), {n: p.grad for n, p in adapted.trainable().items()}))
        adapted.method.cut()
    (masked, dense), (cut, small) = found
    assert _numbers(model) < 0.8 * whole
    torch.testing.assert_close(cut, masked, rtol=0, atol=1e-12)
    plain = _logits(backbone(family).double(), family)
    assert not torch.allclose(_logits(model, family), plain, atol=1e-2)
    for block in adapted.method.blocks:
        # Before the cut the factors of what is gone had no gradient; the others have theirs.
        path = adapted.host.anatomy.path(block.out.module)
        columns = dense[f"{path}.lora.A"]
        kept = block.kept.repeat_interleave(block.units.width)
        assert not columns[:, ~kept].any()
        torch.testing.assert_close(small[f"{path}.lora.A"], columns[:, kept], rtol=0, atol=1e-12)


def _operations(model, data) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**data)
    return counter.get_total_flops()


def test_parameters_and_operations_fall_by_the_ratio():
    plain, data = backbone("bert"), inputs("bert")
    adapted = _attached("bert")
    train(adapted, batch("bert"), 3)
    merged = adapted.merge()
    layers = [sum(p.numel() for n, p in m.named_parameters() if "LayerNorm" not in n) for m in _layers(plain)]
    after = [sum(p.numel() for n, p in m.named_parameters() if "LayerNorm" not in n) for m in _layers(merged)]
    # Half of everything but the two biases of the maps out of the blocks, 32 each.
    assert [n - 64 for n in after] == [(n - 64) // 2 for n in layers]
    rows = len(data["input_ids"])
    head = 2 * rows * (32 * 32 + 32 * plain.config.num_labels)
    assert _operations(merged, data) - head == (_operations(plain, data) - head) // 2


def _layers(model):
    return [layer.module for layer in peftlib.anatomy.of(model).layers]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_files(family, tmp_path):
    adapted = _attached(family)
    _mask(adapted)
    masked, gone = _logits(adapted.model, family), adapted.method.gone()
    loaded = peftlib.load(backbone(family), adapted.save(tmp_path / "masked"))
    assert torch.equal(_logits(loaded.model, family), masked)
    assert loaded.method.gone() == gone
    adapted.method.cut()
    assert adapted.count().stored < loaded.count().stored
    folder = adapted.save(tmp_path / "cut")
    notes = json.loads((folder / "config.json").read_text())["notes"]["gone"]
    assert notes.keys() == gone.keys()
    stack = next(iter(gone)).partition(".")[0]
    assert notes[f"{stack}.0.attention"] == "0, 2"
    assert peftlib.read(folder).notes == {"gone": notes}

    model = backbone(family)
    plain, whole = _logits(model, family), _numbers(model)
    loaded = peftlib.load(model, folder)
    assert loaded.method.gone() == gone
    assert _numbers(model) == _numbers(adapted.model) < whole
    assert torch.equal(_logits(model, family), _logits(adapted.model, family))
    loaded.detach()
    assert torch.equal(_logits(model, family), plain)


def test_a_file_that_does_not_say_what_is_left_is_refused():
    adapted = _attached("bert")
    state = adapted.state()
    name = next(n for n in state if n.endswith("units.kept"))
    for change in ({name: torch.zeros(4, dtype=torch.bool)}, {name: torch.ones(5, dtype=torch.bool)}):
        with pytest.raises(LoadError, match=r"does not say which of the 4 units of .*units\.kept"):
            adapted.method.load_state(state | change)


def test_a_merged_llama_is_built_by_transformers_alone(tmp_path):
    adapted = _attached("llama", "causal_lm")
    train(adapted, batch("llama", "causal_lm"), 3)
    merged = adapted.merge()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)
    assert (again.config.head_dim, again.config.intermediate_size) == (8, 32)
    assert torch.equal(_logits(again, "llama"), _logits(merged, "llama"))
    other = peftlib.attach(again, "prefix_tuning", length=4)  # asks for heads and their size
    assert train(other, batch("llama", "causal_lm"), 2)


def test_a_merged_model_that_a_config_cannot_describe_keeps_its_config():
    for family, options in (("bert", {}), ("llama", {"spare_last": 1}), ("t5", {})):
        adapted = _attached(family, **options)
        train(adapted, batch(family), 3)
        before = adapted.model.config.to_dict()
        merged = adapted.merge()
        assert merged.config.to_dict() == before
        lora = peftlib.attach(merged, "lora", targets="all-linear")
        losses = train(lora, batch(family), 3)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (PeftlibError, "ratio=0 is out of range", {"ratio": 0}),
        (PeftlibError, "ratio=1 leaves nothing of a layer", {"ratio": 1}),
        (PeftlibError, "warmup=0.5 and cooldown=0.5 leave no steps to prune in", {"warmup": 0.5, "cooldown": 0.5}),
        (PeftlibError, "criterion='l1' is not known", {"criterion": "l1"}),
        (PeftlibError, "beta=1 lets no step count", {"beta": 1}),
        (PeftlibError, "interval=0 is too small", {"interval": 0}),
        (TargetError, "ratio=0.01.* remove nothing from 2 layers of 4 heads and 64 channels", {"ratio": 0.01}),
        (TargetError, "spare_last=2 remove nothing", {"spare_last": 2}),
    ],
)
def test_bad_input(error, match, options):
    with pytest.raises(error, match=match):
        peftlib.attach(backbone("bert"), "lora_prune", **options)


def test_it_cannot_be_combined():
    with pytest.raises(UnsupportedError, match="lora_prune cuts the maps that other methods act on"):
        peftlib.attach(backbone("bert"), peftlib.combine("prefix_tuning", "lora_prune"))
