"""What torch and accelerate write of a model with a method attached is read back, and what does not fit is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from accelerate import Accelerator

from peftlib.conformance.case import Case
from peftlib.errors import LoadError
from tests.methods.helpers import perturb

# Shared tensors, parametrized weights, packed buffers, makers, chosen entries, own parameters.
METHODS = [
    "lora",
    "bitfit",
    "prefix_tuning",
    "p_tuning",
    "hyperformer_pp",
    "compacter",
    "moelora",
    "propetl",
    "unipelt",
    "intrinsic_said",
    "threshold_mask",
    "fish_mask",
    "qlora",
    "loftq",
    "adalora",
    "adamix",
    "delta_lora",
    "lora_prune",
]


def changed(method: str, family: str = "bert"):
    adapted = Case(method, family).attach()
    perturb(adapted, std=0.1)
    return adapted


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_is_read_back(method, tmp_path):
    case, adapted = Case(method, "bert"), changed(method)
    expected = case.logits(adapted.model)
    state = adapted.model.state_dict()
    assert not [n for n, t in state.items() if not t.numel()]
    other = case.attach()
    other.model.load_state_dict(state)
    assert torch.equal(case.logits(other.model), expected)
    one = Accelerator(cpu=True)
    one.prepare(adapted.model)
    one.save_state(str(tmp_path))
    other = case.attach()
    two = Accelerator(cpu=True)
    two.prepare(other.model)
    two.load_state(str(tmp_path))
    torch.testing.assert_close(case.logits(other.model), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_pickled_or_copied_model_answers_alike(method):
    """As ``torch.save(model)`` has it, and an average of weights (EMA)."""
    case, adapted = Case(method, "bert"), changed(method)
    expected = case.logits(adapted.model)
    file = io.BytesIO()
    torch.save(adapted.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(case.logits(again), expected)
    average = torch.optim.swa_utils.AveragedModel(adapted.model)
    average.update_parameters(adapted.model)
    assert torch.equal(case.logits(average.module), expected)
    twin = copy.deepcopy(adapted.model)
    twin.load_state_dict(adapted.model.state_dict())
    assert torch.equal(case.logits(twin), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("made", "with_options", "here", "here_options", "said"),
    [
        ("lora", {"rank": 4}, "lora", {"rank": 2}, r"\.A has shape \(4, 32\) in it and \(2, 32\) here"),
        ("lora", {}, "lora", {"targets": ("attention.query",)}, r"it has \d+ tensors that this model has not"),
        ("lora", {"targets": ("attention.query",)}, "lora", {}, r"it lacks \d+ of this model's"),
        ("lora", {}, "sequential_adapter", {}, r"it has \d+ .* and it lacks"),
        ("lora", {}, "bitfit", {}, r"it has \d+ tensors that this model has not"),
        ("fish_mask", {}, "lora", {}, r"it has \d+ .* and it lacks"),
        ("prefix_tuning", {}, "prompt_tuning", {}, r"it has \d+ .* and it lacks"),
    ],
)
def test_a_state_of_another_method_or_of_other_options_is_refused(made, with_options, here, here_options, said, strict):
    state = Case(made, "bert", options=with_options).attach().model.state_dict()
    adapted = Case(here, "bert", options=here_options).attach()
    before = {n: t.clone() for n, t in adapted.model.state_dict().items()}
    with pytest.raises(LoadError, match=f"another method than the one attached, or of other options: .*{said}"):
        adapted.model.load_state_dict(state, strict=strict)
    assert all(torch.equal(t, before[n]) for n, t in adapted.model.state_dict().items())


def test_the_backbone_s_weights_and_another_head_pass():
    case = Case("lora", "bert")
    adapted = changed("lora")
    trained = {n: p.detach().clone() for n, p in adapted.trainable().items() if n not in adapted.head_names}
    state = {f"cls.{n}" if n.startswith("classifier") else n: t for n, t in case.backbone().state_dict().items()}
    found = adapted.model.load_state_dict(state, strict=False)
    assert {n.split(".")[0] for n in found.unexpected_keys} == {"cls"}
    assert all(torch.equal(adapted.trainable()[n], t) for n, t in trained.items())


def test_inside_of_another_module_names_have_a_prefix():
    one, other = (torch.nn.ModuleDict({"inner": changed("prefix_tuning").model}) for _ in range(2))
    other.load_state_dict(one.state_dict())
    with pytest.raises(LoadError, match="another method"):
        torch.nn.ModuleDict({"inner": changed("lora").model}).load_state_dict(one.state_dict())
