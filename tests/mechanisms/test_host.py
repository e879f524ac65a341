"""Each seam of the host: what it computes, what it trains, and that it is taken back without a trace."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from peftlib.conformance.case import FAMILIES, backbone, inputs, lm_head, logits
from peftlib.conformance.checks import assert_same_structure, structure_of
from peftlib.errors import LoadError, StateError
from peftlib.mechanisms import attention
from peftlib.mechanisms.host import Host
from peftlib.mechanisms.prefix import Prefix
from peftlib.training import state_dict


class Shift(nn.Module):
    """Adds a trained number to what it is given last; ``frozen`` is a parameter that does not train."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return tensors[-1] + self.value


class Scale(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.value


class AddFirst(nn.Module):
    """``y + x`` for the kept input x."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + x.mean()


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.fixture
def model():
    return backbone("bert")


@pytest.fixture
def host(model):
    return Host(model)


def check_undone(host: Host, before: dict[str, torch.Tensor], structure: dict) -> None:
    host.remove()
    model = host.model
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert_same_structure(structure_of(model), structure)
    assert all(p.requires_grad for p in model.parameters())
    assert host.trained() == {}


SEAMS = {
    "add": lambda h, s: h.add(s.module, "shift", Shift()),
    "after": lambda h, s: h.after(s, "shift", Shift()),
    "before": lambda h, s: h.before(s, "shift", Shift()),
    "connect": lambda h, s: h.connect(h.anatomy.sites("ffn.up")[0], h.anatomy.sites("ffn.down")[0], "add", AddFirst()),
    "parametrize": lambda h, s: h.parametrize(s.module.weight, Scale(2.0)),
    "train": lambda h, s: h.train([s.module.weight]),
    "replace": lambda h, s: h.replace(s.path, nn.Linear(s.module.in_features, s.module.out_features)),
    "attention": lambda h, s: attention.attach(h, h.anatomy.layers[0].attention, "prefix", Prefix(4, 3, 8)),
    "hook": lambda h, s: h.hook(h.model, lambda module, args, kwargs, output: None),
}


@pytest.mark.parametrize("seam", SEAMS)
def test_every_seam_is_undone(seam):
    model = backbone("bert")
    before, structure = everything(model), structure_of(model)
    host = Host(model)
    assert not any(p.requires_grad for p in model.parameters())
    SEAMS[seam](host, host.anatomy.sites("attention.query")[0])
    for parameter in host.trained().values():
        assert parameter.requires_grad
        with torch.no_grad():
            parameter.add_(1.0)
    logits(model, **inputs("bert"))
    assert seam == "hook" or structure_of(model) != structure or seam == "train"
    check_undone(host, before, structure)


def test_all_seams_at_once_are_undone_in_the_right_order():
    model = backbone("bert")
    before, structure = everything(model), structure_of(model)
    host = Host(model)
    sites = host.anatomy.sites()
    for index, seam in enumerate(s for s in SEAMS if s != "attention"):
        SEAMS[seam](host, sites[index])
    SEAMS["attention"](host, None)
    logits(model, **inputs("bert"))
    check_undone(host, before, structure)


def test_after_gives_input_and_output_and_before_changes_the_input(host, model):
    site = host.anatomy.sites("ffn.up")[0]
    x = torch.randn(2, 3, site.in_features)
    plain = site.module(x)
    host.after(site, "after", Shift(3.0))
    assert torch.equal(site.module(x), plain + 3.0)
    other = host.anatomy.sites("ffn.up")[1]
    plain = other.module(x + 0.5)
    host.before(other, "before", Shift(0.5))
    assert torch.equal(other.module(x), plain)


def test_connect_joins_the_first_input_with_the_last_output(host):
    layer = host.anatomy.layers[0]
    up, down = layer.sites["ffn.up"], layer.sites["ffn.down"]
    seen = {}
    up.module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    down.module.register_forward_hook(lambda m, args, y: seen.update(y=y))
    host.connect(up, down, "join", AddFirst())
    (keep,) = (hook for hook in up.module._forward_pre_hooks.values() if isinstance(hook, partial))
    result = {}
    down.module.register_forward_hook(lambda m, args, y: result.update(y=y))
    logits(host.model, **inputs("bert"))
    assert torch.equal(result["y"], seen["y"] + seen["x"].mean())
    assert keep.args[0].value is None, "the input is kept after the forward"


def test_a_fused_projection_takes_three_children_on_its_parts():
    model = backbone("gpt2")
    host = Host(model)
    sites = host.anatomy.sites(("attention.query", "attention.key", "attention.value"))[:3]
    assert len({id(s.module) for s in sites}) == 1
    x = torch.randn(2, 3, 32)
    plain = sites[0].module(x)
    for number, site in enumerate(sites):
        host.after(site, "shift", Shift(float(number + 1)))
    query, key, value = (sites[0].module(x) - plain).chunk(3, dim=-1)
    assert torch.allclose(query, torch.ones_like(query))
    assert torch.allclose(key, 2 * torch.ones_like(key))
    assert torch.allclose(value, 3 * torch.ones_like(value))
    assert len(host.trained()) == 3


def _log(log: list, word: str, generate, *args, **kwargs):
    log.append(word)
    return generate(*args, **kwargs)


def test_around_generate_nests_and_leaves_with_the_method():
    model = backbone("gpt2", "causal_lm")
    structure, ids, log = structure_of(model), inputs("gpt2")["input_ids"][:1, :3], []
    expected = model.generate(ids, max_new_tokens=3)
    host = Host(model)
    for word in ("inner", "outer"):
        host.around_generate(_log, log, word)
    twin = copy.deepcopy(host)
    assert torch.equal(model.generate(ids, max_new_tokens=3), expected)
    assert log == ["outer", "inner"]
    # The copy's generate runs the copy.
    with torch.no_grad():
        twin.model.get_input_embeddings().weight.zero_()
    assert not torch.equal(twin.model.generate(ids, max_new_tokens=3), expected)
    for other in (twin, host):
        other.remove()
        assert_same_structure(structure_of(other.model), structure)
    assert torch.equal(model.generate(ids, max_new_tokens=3), expected)
    assert len(log) == 2


def test_only_parameters_that_ask_for_it_train_and_buffers_are_stored(host):
    site = host.anatomy.sites("ffn.up")[0]
    host.after(site, "shift", Shift())
    assert list(host.trained()) == [f"{site.path}.shift.value"]
    assert set(host.state()) == {f"{site.path}.shift.{n}" for n in ("value", "frozen", "seen")}


def test_a_taken_name_is_an_error(host):
    site = host.anatomy.sites("ffn.up")[0]
    host.after(site, "shift", Shift())
    with pytest.raises(StateError, match="already has a part named 'shift'"):
        host.after(site, "shift", Shift())


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_a_tied_embedding_is_parametrized_wherever_it_is_used(family):
    model = backbone(family, lm_head(family))
    tied = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is tied
    data = inputs(family, lm_head(family))
    before, structure, answer = everything(model), structure_of(model), logits(model, **data)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.5)
    assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight

    host = Host(model)
    host.parametrize(tied, Scale(1.5))
    changed = logits(model, **data)
    assert not torch.allclose(changed, answer)
    assert torch.allclose(changed, logits(reference, **data), atol=1e-5)
    assert len(host.trained()) == 1
    assert len(host.state()) == 1
    host.remove()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is tied
    assert list(model.state_dict()) == list(before)
    assert_same_structure(structure_of(model), structure)
    assert torch.equal(logits(model, **data), answer)

    host = Host(model)
    host.parametrize(tied, Scale(1.5))
    host.remove(merge=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is tied
    assert torch.allclose(logits(model, **data), changed, atol=1e-5)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_a_weight_is_parametrized_once(host):
    weight = host.anatomy.sites("ffn.up")[0].module.weight
    host.parametrize(weight, Scale(2.0))
    with pytest.raises(StateError, match="another method"):
        host.parametrize(weight, Scale(2.0))


def test_a_weight_is_written_by_one_method():
    host = Host(backbone("gpt2"))
    query, value = host.anatomy.sites(("attention.query", "attention.value"))[:2]
    first, second = host.scope(), host.scope()
    original = first.write(query)
    assert torch.equal(second.write(value), value.weight)
    assert original.data_ptr() != query.weight.data_ptr()
    with pytest.raises(StateError, match=r"another method writes into the weight of .*c_attn\[0/3\]"):
        second.write(query)
    assert [part.written for part in (first, second)] == [[query], [value]]


def test_a_merge_keeps_trained_parameters_and_writes_parametrized_ones(host, model):
    first, second = host.anatomy.sites("ffn.up")
    scaled, moved = first.module.weight, second.module.weight
    before = scaled.detach().clone(), moved.detach().clone()
    host.parametrize(scaled, Scale(2.0))
    host.train([moved])
    with torch.no_grad():
        moved.add_(1.0)
    host.remove(merge=True)
    assert torch.equal(first.module.weight, 2 * before[0])
    assert torch.equal(second.module.weight, before[1] + 1)
    assert first.module.weight is scaled


def test_without_originals_the_host_cannot_restore(model):
    host = Host(model, keep_original=False)
    assert host.can_restore
    host.train([host.anatomy.sites()[0].module.weight])
    assert not host.can_restore


def test_a_scope_knows_its_own_changes_and_the_whole_undoes_them(model):
    before, structure = everything(model), structure_of(model)
    host = Host(model)
    one, two = host.scope(), host.scope()
    first, second = host.anatomy.sites("ffn.up")
    one.after(first, "shift", Shift())
    two.after(second, "shift", Shift())
    two.train([second.module.bias])
    assert set(one.trained()) == {f"{first.path}.shift.value"}
    assert set(two.trained()) == {f"{second.path}.shift.value", f"{second.path}.bias"}
    assert host.trained().keys() == one.trained().keys() | two.trained().keys()
    check_undone(host, before, structure)


def test_load_state_names_what_is_missing_left_over_and_of_another_shape(host):
    site = host.anatomy.sites("ffn.up")[0]
    host.after(site, "shift", Shift())
    state = {n: t.clone() for n, t in host.state().items()}
    name = f"{site.path}.shift.value"
    with pytest.raises(LoadError, match=r"1 tensors are missing.*value"):
        host.load_state({n: t for n, t in state.items() if n != name})
    with pytest.raises(LoadError, match=r"1 are left over.*'more'"):
        host.load_state(state | {"more": torch.zeros(1)})
    with pytest.raises(LoadError, match=r"shift\.value has shape \(2,\) in the file, \(\) here"):
        host.load_state(state | {name: torch.zeros(2)})
    host.load_state(state | {name: torch.tensor(7.0)})
    assert float(host.trained()[name].detach()) == 7.0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_seam_alone_changes_nothing(family):
    for head in ("classification", lm_head(family)):
        model = backbone(family, head)
        data = inputs(family, head)
        before = logits(model, **data)
        host = Host(model)
        attention.use(host)
        assert model.config._attn_implementation == attention.NAME
        assert torch.equal(logits(model, **data), before)
        host.remove()
        assert model.config._attn_implementation != attention.NAME


def test_two_children_on_one_attention_act_in_order_and_leave_together(model):
    structure = structure_of(model)
    host = Host(model)
    module = host.anatomy.layers[0].attention
    for name in ("one", "two"):
        attention.attach(host, module, name, Prefix(4, 2, 8))
    assert module.peftlib_attention == ("one", "two")
    logits(model, **inputs("bert"))
    host.remove()
    assert_same_structure(structure_of(model), structure)


def test_a_shared_child_is_saved_once_with_the_whole_model(tmp_path, model):
    before, structure = everything(model), structure_of(model)
    host = Host(model)
    child = Shift(0.5)
    for site in host.anatomy.sites("ffn.up"):
        host.after(site, "shift", child)
    paths = [f"{site.path}.shift" for site in host.anatomy.sites("ffn.up")]
    assert set(host.state()) == {f"{paths[0]}.{n}" for n in ("value", "frozen", "seen")}
    with pytest.raises(RuntimeError, match="shared tensors"):
        model.save_pretrained(tmp_path)
    state_dict.look_after(host)
    assert set(model.state_dict()) - set(before) == set(host.state())
    model.save_pretrained(tmp_path)
    state = everything(model)
    with torch.no_grad():
        child.value.add_(1.0)
    model.load_state_dict(state)
    assert float(child.value) == 0.5
    check_undone(host, before, structure)


def test_a_deep_copy_undoes_its_own_changes(model):
    before, structure = everything(model), structure_of(model)
    host = Host(model)
    sites = host.anatomy.sites()
    for index, seam in enumerate(s for s in SEAMS if s not in ("attention", "hook")):
        SEAMS[seam](host, sites[index])
    SEAMS["attention"](host, None)
    host.hook(model, partial(_nothing))
    attached, answer = structure_of(model), logits(model, **inputs("bert"))
    twin = copy.deepcopy(host)
    assert twin.model is not model
    check_undone(twin, before, structure)
    assert_same_structure(structure_of(model), attached)
    assert torch.equal(logits(model, **inputs("bert")), answer)
    check_undone(host, before, structure)


def _nothing(module, args, kwargs, output):
    return None
