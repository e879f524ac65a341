"""What attach() and load() take beside a method's own options: layers, token embeddings, the head, frozen parts."""

from __future__ import annotations

import itertools

import pytest
import torch

import peftlib
from peftlib import saved
from peftlib.conformance.case import Case, backbone, logits, supported_family, train
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import ConfigError, LoadError, PeftlibError, StateError, TargetError
from tests.methods.helpers import perturb

METHODS = peftlib.methods()


def model(num_labels: int = 2, family: str = "bert") -> torch.nn.Module:
    return peftlib.backbones.load(f"tiny-{family}", num_labels=num_labels, dropout=0.0).model


# Layers


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix_tuning", "sequential_adapter", "bitfit", "threshold_mask"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_method_acts_on_some_layers_only(method, family, tmp_path):
    if (method, family) == ("bitfit", "t5"):
        family = "gpt2"
    case = Case(method, family)
    everywhere = case.attach().trainable()
    bare = case.backbone()
    structure, before = structure_of(bare), case.logits(bare)
    adapted = case.attach(bare, layers_to_transform=(-1,))
    last = adapted.host.anatomy.layers[-1].path
    head = set(adapted.head_names)
    assert all(n.startswith(f"{last}.") for n in adapted.trainable() if n not in head)
    assert {n for n in everywhere if n.startswith(f"{last}.")} <= adapted.trainable().keys()
    perturb(adapted)
    tuned = case.logits(adapted.model)
    loaded = peftlib.load(case.backbone(), adapted.save(tmp_path))
    assert torch.equal(case.logits(loaded.model), tuned)
    assert loaded.state().keys() == adapted.state().keys()
    assert torch.equal(case.logits(adapted.detach()), before)
    assert_same_structure(structure_of(bare), structure)


@pytest.mark.parametrize("layers", [(), (2,), (0, 9), (-3,)])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(TargetError, match=r"are not all among the 2 layers"):
        peftlib.attach(backbone("bert"), "lora", layers_to_transform=layers)


def test_each_layer_can_have_options_of_its_own():
    first, last = (peftlib.LoRAConfig(rank=r, targets=(f"*.layer.{i}.*query",)) for i, r in enumerate((2, 4)))
    adapted = peftlib.attach(backbone("bert"), peftlib.combine(first, last))
    ranks = {n.split(".")[3]: len(p) for n, p in adapted.trainable().items() if n.endswith(".A")}
    assert ranks == {"0": 2, "1": 4}


# Parts that are switched off


def test_parts_can_be_switched_off():
    for options, where in (({"inputs": ()}, "attention"), ({"outputs": ()}, "output.dense")):
        adapted = peftlib.attach(backbone("bert"), "ia3", **options)
        names = [n for n in adapted.trainable() if n not in adapted.head_names]
        assert names
        assert all(where in n for n in names)
    with pytest.raises(TargetError, match="both empty"):
        peftlib.attach(backbone("bert"), "ia3", inputs=(), outputs=())
    for method in ("qlora", "loftq"):
        adapted = peftlib.attach(backbone("bert"), method, rank=2, quantize=())
        assert (
            adapted.count().method
            == peftlib.attach(backbone("bert"), "lora", rank=2, targets="all-linear").count().method
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_a_user_freezes_again_stays_and_everything_else_agrees(method, tmp_path):
    case = Case(method, supported_family(method))
    adapted = case.attach()
    names = [n for n in adapted.trainable() if n not in adapted.head_names]
    frozen = {n: adapted.trainable()[n] for n in names[::2]}
    before = {n: p.detach().clone() for n, p in adapted.trainable().items()}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    left = before.keys() - frozen.keys()
    assert adapted.trainable().keys() == left
    assert adapted.count().trained - adapted.method.searched() == sum(before[n].numel() for n in left)
    grouped = itertools.chain.from_iterable(group["params"] for group in adapted.parameter_groups(1e-3))
    assert {id(p) for p in grouped} == {id(p) for p in adapted.trainable().values()}
    train(adapted, case.batch(), 2)
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())
    tuned = case.logits(adapted.model)
    loaded = peftlib.load(case.backbone(), adapted.save(tmp_path))
    assert torch.allclose(case.logits(loaded.model), tuned, atol=1e-6)
    adapted.detach()


# Token embeddings


def grown(family: str, head: str) -> torch.nn.Module:
    torch.manual_seed(0)
    found = backbone(family, head)
    found.resize_token_embeddings(260)
    return found


@pytest.mark.parametrize("rows", [True, (3, 257, 258)], ids=["all", "rows"])
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classification"), ("llama", "causal_lm"), ("gpt2", "causal_lm"), ("t5", "seq2seq")]
)
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "bitfit", "mam_adapter", "child_tuning_f"])
def test_token_embeddings_train_and_are_saved_along(method, family, head, rows, tmp_path):
    case = Case(method, family, head)
    bare = grown(family, head)
    if method == "child_tuning_f" and rows is not True:
        with pytest.raises(ConfigError, match="trains the token embeddings itself"):
            case.start(bare, train_embeddings=rows)
        return
    if method == "bitfit" and family in ("llama", "t5"):
        return
    data = case.inputs()
    data["input_ids"][:, 1] = 257
    before = logits(bare, **data)
    tables = {id(m.weight): m.weight for m in (bare.get_input_embeddings(), bare.get_output_embeddings()) if m}
    adapted = case.attach(bare, train_embeddings=rows)
    plain = peftlib.attach(grown(family, head), case.config)
    more = sum(t.numel() if rows is True else 3 * t.shape[1] for t in tables.values())
    assert adapted.count().trained - plain.count().trained == (
        0 if method == "child_tuning_f" and rows is True else more
    )
    start = bare.get_input_embeddings().weight.detach().clone()
    adapted.model.train()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(0.1))
    with adapted.lifecycle(1) as life:
        life.step_start()
        adapted.model(**data, **({} if "labels" in data else {"labels": case.batch()["labels"]})).loss.backward()
        life.gradients()
        optimizer.step()
        life.step_end()
    optimizer.zero_grad()
    tuned = logits(bare, **data)
    moved = (bare.get_input_embeddings().weight - start).abs().sum(1) > 0
    if rows is not True:
        assert moved.nonzero().flatten().tolist() in ([257], [3, 257], [3, 257, 258])
    assert moved[257]
    folder = adapted.save(tmp_path)
    loaded = peftlib.load(grown(family, head), folder)
    assert torch.equal(logits(loaded.model, **data), tuned)
    with adapted.disabled() as disabled:
        assert torch.equal(logits(disabled, **data), before)
    with pytest.raises(StateError, match="acts on the token embeddings"):
        bare.resize_token_embeddings(270)
    assert torch.equal(logits(adapted.detach(), **data), before)


@pytest.mark.parametrize("method", ["fish_mask", "lt_sft", "diff_pruning"])
def test_rows_that_train_are_not_among_what_is_chosen(method, tmp_path):
    case = Case(method, "bert")
    adapted = case.attach(train_embeddings=(3,))
    perturb(adapted)
    table = "bert.embeddings.word_embeddings.parametrizations.weight"
    assert {n for n in adapted.trainable() if "word_embeddings" in n} == {f"{table}.0.values"}
    loaded = peftlib.load(case.backbone(), adapted.save(tmp_path))
    assert torch.equal(case.logits(loaded.model), case.logits(adapted.model))
    for refused in ("full", "intrinsic_said"):
        with pytest.raises(PeftlibError):
            Case(refused, "bert").start(train_embeddings=(3,))


def test_merged_embeddings_stay():
    bare = grown("llama", "causal_lm")
    adapted = peftlib.attach(bare, "lora", train_embeddings=(257,))
    perturb(adapted)
    ids = torch.tensor([[1, 257, 5]])
    tuned = logits(bare, input_ids=ids)
    assert torch.allclose(logits(adapted.merge(), input_ids=ids), tuned, atol=1e-5)


def test_tokens_that_do_not_exist():
    structure = structure_of(bare := backbone("bert"))
    with pytest.raises(TargetError, match=r"not all token ids, 0 to 255.*resize_token_embeddings"):
        peftlib.attach(bare, "lora", train_embeddings=(3, 256))
    assert_same_structure(structure_of(bare), structure)


# The head


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning", "fish_mask", "bitfit", "mam_adapter"])
def test_an_adapter_goes_onto_another_head_without_its_own(method, tmp_path):
    adapted = Case(method, "bert").attach()
    perturb(adapted)
    folder = adapted.save(tmp_path)
    with pytest.raises(LoadError, match=r"head=False"):
        peftlib.load(model(5), folder)
    other = model(5)
    own = {n: p.detach().clone() for n, p in peftlib.anatomy.of(other).head.items()}
    loaded = peftlib.load(other, folder, head=False)
    assert all(torch.equal(p, own[n]) for n, p in peftlib.anatomy.of(other).head.items())
    assert set(loaded.head_names) == set(own)
    state = loaded.state()
    assert all(torch.equal(t, state[n]) for n, t in adapted.state().items() if n not in adapted.head_names)


def test_without_its_head_onto_a_model_for_tokens(tmp_path):
    folder = peftlib.attach(backbone("bert"), "lora").save(tmp_path)
    other = peftlib.backbones.load("tiny-bert", head="masked_lm").model
    with pytest.raises(LoadError, match="head=False"):
        peftlib.load(other, folder)
    assert peftlib.load(other, folder, head=False).count().method == 2 * 2 * 8 * 64


def test_the_names_of_the_classes_come_back(tmp_path):
    named = model(3)
    named.config.id2label, named.config.label2id = {0: "c", 1: "a", 2: "b"}, {"c": 0, "a": 1, "b": 2}
    folder = peftlib.attach(named, "lora").save(tmp_path)
    assert saved.read(folder).labels == ("c", "a", "b")
    fresh = model(3)
    loaded = peftlib.load(fresh, folder)
    assert fresh.config.id2label == {0: "c", 1: "a", 2: "b"}
    assert fresh.config.label2id == {"c": 0, "a": 1, "b": 2}
    assert loaded.detach().config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert peftlib.load(fresh, folder).merge().config.id2label[0] == "c"
    other = model(3)
    other.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(LoadError, match=r"in the order c, a, b.*in the order a, b, c"):
        peftlib.load(other, folder)
    assert not hasattr(other, "peftlib_adapted")
    assert peftlib.load(other, folder, head=False).model.config.id2label[0] == "a"


# Several at once


def test_two_seeds_side_by_side():
    one, two, again = (peftlib.attach(backbone("bert"), "lora", seed=s) for s in (0, 1, 0))
    name = next(n for n in one.trainable() if n.endswith(".A"))
    assert torch.equal(one.trainable()[name], again.trainable()[name])
    assert not torch.equal(one.trainable()[name], two.trainable()[name])


def test_a_cell_that_runs_twice_is_told_what_to_do():
    bare = backbone("bert")
    peftlib.attach(bare, "lora")
    with pytest.raises(StateError, match=r"model\.peftlib_adapted\.detach\(\)"):
        peftlib.attach(bare, "lora")
    bare.peftlib_adapted.detach()
    assert peftlib.attach(bare, "lora").count().trained
