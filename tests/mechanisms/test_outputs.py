"""What a model is asked for beside its logits stays of the text's length, whatever a method adds."""

import pytest
import torch

import peftlib
from peftlib.conformance.case import ENCODER_DECODERS, Case, logits
from peftlib.errors import UnsupportedError
from peftlib.mechanisms.outputs import logits_of
from tests.methods.helpers import inputs, perturb

OPTIONS = {
    "prompt_tuning": {"length": 5},
    "p_tuning": {},
    "prefix_tuning": {"length": 3},
    "mam_adapter": {},
    "unipelt": {},
    "propetl": {"form": "prefix"},
    "tiny_attention_adapter": {},
    "residual_adapter": {},
    "sequential_adapter": {"variant": "pfeiffer"},
}
ASKED = {"output_attentions": True, "output_hidden_states": True}


def attached(method, family, head, before=None):
    case = Case(method, family, head, options=OPTIONS[method])
    model = case.backbone()
    model.set_attn_implementation("eager")
    if before:
        before(model)
    adapted = peftlib.attach(model, case.config)
    perturb(adapted, std=0.2)
    return adapted.model.eval()


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "opt", "llama", "mistral", "t5", "bart"])
@pytest.mark.parametrize("method", OPTIONS)
def test_hidden_states_and_attentions_are_the_text_s(method, family):
    head = "seq2seq" if family in ENCODER_DECODERS else "classification"
    given = inputs(family)
    given |= {"decoder_input_ids": given["input_ids"][:, :4]} if head == "seq2seq" else {}
    t = given["input_ids"].shape[1]
    model = attached(method, family, head)
    with torch.no_grad():
        plain, out = model(**given).logits, model(**given, **ASKED)
    torch.testing.assert_close(out.logits, plain, atol=2e-5, rtol=1e-4)
    asked = {k: v for k, v in out.items() if k.endswith(("hidden_states", "attentions"))}
    assert len(asked) == (5 if head == "seq2seq" else 2)
    for name, layers in asked.items():
        assert len(layers) == 2 + name.endswith("hidden_states")
        q, k = (t, t) if head != "seq2seq" or name.startswith("encoder") else (4, t if name.startswith("cross") else 4)
        for layer in layers:
            assert layer.shape[1:2] == (q,) if layer.dim() == 3 else layer.shape[2:] == (q, k), name


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_generate_gives_them_step_by_step(method):
    model = attached(method, "llama", "causal_lm")
    given = {k: v[:1, :5] for k, v in inputs("llama").items()}
    out = model.generate(
        **given, **ASKED, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    t = given["input_ids"].shape[1]
    assert [step[0].shape[2:] for step in out.attentions] == [(t, t), (1, t + 1), (1, t + 2)]
    assert [step[-1].shape[1] for step in out.hidden_states] == [t, 1, 1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama", "mistral", "t5", "bart"])
def test_the_weights_are_those_of_the_family_s_eager_attention(family):
    """A method that watches an attention and leaves it as it is."""
    model, given = Case("lora", family).backbone().eval(), inputs(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = model(**given, **ASKED)
        peftlib.attach(model, "tiny_attention_adapter")
        for name, parameter in model.named_parameters():
            if ".output." in name and "tiny_attention" in name:
                parameter.zero_()
        mine = model.eval()(**given, **ASKED)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=1e-4)
    for name in (n for n in theirs if n.endswith("attentions")):
        for a, b in zip(mine[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["residual_adapter", "sequential_adapter"])
def test_what_the_model_was_asked_before_the_method_came_does_not_hide_it(method):
    def ask(model):
        model.eval()(**inputs("llama"), **ASKED)

    one, other = (attached(method, "llama", "causal_lm", before=before) for before in (None, ask))
    with torch.no_grad():
        mine, theirs = (m(**inputs("llama"), **ASKED).hidden_states for m in (one, other))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_of_answers_starts_and_ends_stand_side_by_side():
    model = Case("lora", "bert").backbone()
    out = model(**inputs("bert"))
    assert logits_of(out) is out.logits
    with pytest.raises(UnsupportedError, match=r"BaseModelOutput.* has none"):
        logits_of(model.bert(**inputs("bert")))
    assert logits(model, **inputs("bert")).shape == (3, 2)
