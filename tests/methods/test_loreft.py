"""LoReFT: its equation and tokens, parity with pyreft, published counts, generation, and what its R is."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftlib
from peftlib import backbones
from peftlib.conformance.case import batch, logits, train
from peftlib.errors import ConfigError, TargetError, UnsupportedError
from peftlib.methods.since_survey.loreft import FORMS, Orthonormal, Tokens
from tests.methods.facts import Count, Default, Facts, Start, Trains, uniform
from tests.methods.helpers import backbone, inputs, perturb

GOLDEN = Path(__file__).parents[1] / "golden" / "loreft.safetensors"


def edited(form: str, h, R, W, b):
    """The equations of the paper, for one token."""
    return {
        "loreft": lambda: h + R.T @ (W @ h + b - R @ h),
        "noreft": lambda: h + R.T @ (W @ h + b - R @ h),
        "direft": lambda: h + R.T @ (W @ h + b),
        "nodireft": lambda: h + R.T @ (W @ h + b),
        "consreft": lambda: h + R.T @ (b - R @ h),
        "lobireft": lambda: h + R.T @ b,
    }[form]()


def tokens_of(mask: list[int], first: int, last: int) -> tuple[list[int], list[int]]:
    """Which columns of a row are edited: of n tokens the first min(first, n // 2) and the last min(last, n // 2)."""
    real = [column for column, token in enumerate(mask) if token]
    half = len(real) // 2
    return real[: min(first, half)], real[len(real) - min(last, half) :]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "two"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_equation_at_every_token(form, tied):
    model = backbone("bert").double()
    adapted = peftlib.attach(model, "loreft", rank=3, first=2, last=3, form=form, tied=tied)
    model.double()
    perturb(adapted)
    layer, data = adapted.host.anatomy.layers[1].module, inputs("bert")
    seen = []
    layer.output.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**data)
    before, after = seen[0], seen[1] if isinstance(seen[1], torch.Tensor) else seen[1][0]
    expected, edits = before.clone(), 0
    for row, mask in enumerate(data["attention_mask"].tolist()):
        for which, columns in zip(("first", "last"), tokens_of(mask, 2, 3)):
            edit = getattr(layer, "loreft" if tied else f"loreft_{which}")
            for column in columns:
                expected[row, column] = edited(form, before[row, column], edit.R(), edit.W, edit.b)
                edits += 1
    assert edits == 3 * (2 + 3) - (data["attention_mask"].sum(1) < 6).sum()
    torch.testing.assert_close(after, expected, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(after, before, atol=1e-2)


# mask, labels, what generate() was given, tokens in the cache, first, last: the columns of the call that are edited
PLACES = [
    ("11111111", None, None, 0, 2, 3, "11000111"),
    ("00111111", None, None, 0, 2, 1, "00110001"),
    ("11111100", None, None, 0, 2, 1, "11000100"),
    ("01101110", None, None, 0, 2, 2, "01100110"),
    ("11111000", None, None, 0, 7, 7, "11011000"),
    ("11100000", None, None, 0, 7, 0, "10000000"),
    ("10000000", None, None, 0, 7, 7, "00000000"),
    ("00000000", None, None, 0, 7, 7, "00000000"),
    ("11111111", "....aaaa", None, 0, 1, 1, "10010000"),
    ("00111111", "....aa.a", None, 0, 1, 1, "00110000"),
    ("00111111", "..aaaaaa", None, 0, 1, 1, "00100001"),
    ("11111111", "........", None, 0, 1, 1, "10000001"),
    ("01111111", None, 5, 0, 2, 1, "01101000"),
    ("11111111", None, 5, 5, 2, 1, None),
    ("11111111", None, None, 5, 2, 1, None),
    ("11111111", None, 6, 4, 2, 3, "1100"),
]


@pytest.mark.parametrize(("mask", "labels", "prompt", "past", "first", "last", "expected"), PLACES)
def test_tokens(mask, labels, prompt, past, first, last, expected):
    tokens, cache = Tokens(first, last), type("Cache", (), {"get_seq_length": lambda self: past})()
    tokens.now.prompt = prompt
    if labels is not None:
        tokens.now.labels = torch.tensor([[-100 if c == "." else 5 for c in labels]])
    call = {"attention_mask": torch.tensor([[int(c) for c in mask]]), "past_key_values": cache}
    tokens.see(call | {"input_ids": torch.zeros(1, len(mask) - past, dtype=torch.long)})
    found = tokens.places("both")
    assert (None if found is None else "".join(str(int(x)) for x in found.flatten())) == expected
    assert tokens.now.labels is None


def _golden() -> tuple[dict[str, torch.Tensor], dict, dict]:
    with safetensors.safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return tensors, json.loads(metadata["config"]), json.loads(metadata["edit"])


def _with_their_weights(form: str, tied: bool):
    """The golden file's backbone with its edits; and for each edit its key in the file, and the signs of R's rows. The
    reflections decide these, and the rows of W and b have the same."""
    golden, config, options = _golden()
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict({n.removeprefix("model."): t for n, t in golden.items() if n.startswith("model.")})
    adapted = peftlib.attach(model, "loreft", form=form, tied=tied, **options)
    edits = {}
    for index, layer in enumerate(adapted.host.anatomy.layers):
        for part in ("",) if tied else ("first", "last"):
            edit = getattr(layer.module, f"loreft_{part}".removesuffix("_"))
            name = f"{form}.{index}" if tied else f"{form}-untied.{index}.{part}"
            R, signs = golden[f"{name}.R"], torch.ones(options["rank"])
            with torch.no_grad():
                if isinstance(edit.R, Orthonormal):
                    reflections, _ = torch.geqrf(R.T)
                    signs = reflections.diagonal().sign()
                    edit.R.V.copy_(reflections.T.triu(1))
                else:
                    edit.R.R.copy_(R)
                edit.b.copy_(signs * golden[f"{name}.b"])
                if edit.W is not None:
                    edit.W.copy_(signs[:, None] * golden[f"{name}.W"])
                torch.testing.assert_close(edit.R(), signs[:, None] * R, atol=1e-6, rtol=0)
            edits[name] = edit, signs
    return golden, adapted, edits


@pytest.mark.parametrize(("form", "tied"), [*((form, True) for form in FORMS), ("loreft", False)])
def test_parity_with_pyreft(form, tied):
    """Logits, loss and all gradients, that of R itself too, for answers behind prompts of two lengths."""
    golden, adapted, edits = _with_their_weights(form, tied)
    key, rows = form if tied else f"{form}-untied", {}
    for name, (edit, _) in edits.items():
        edit.R.register_forward_hook(lambda module, args, R, name=name: rows.__setitem__(name, R))
    data = {name: golden[name] for name in ("input_ids", "attention_mask", "labels")}
    output, real = adapted.model(**data), data["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], golden[f"{key}.logits"][real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, golden[f"{key}.loss"], atol=1e-5, rtol=1e-5)
    for R in rows.values():
        R.retain_grad() if not R.is_leaf else None
    output.loss.backward()
    compared = 0
    for name, (edit, signs) in edits.items():
        for end, tensor in (("R", rows[name]), ("W", edit.W), ("b", edit.b)):
            if tensor is not None:
                expected = golden[f"{name}.{end}.grad"]
                mine = signs.view(-1, *[1] * (expected.dim() - 1)) * tensor.grad
                torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
                compared += 1
    assert compared == sum(name.endswith(".grad") for name in golden if name.startswith(f"{key}."))


@pytest.mark.parametrize("side", ["left", "right"])
def test_parity_on_either_side_of_the_padding(side):
    golden, adapted, _ = _with_their_weights("loreft", True)
    ids, mask = golden["input_ids"], golden["attention_mask"]
    if side == "left":
        shifts = [int(mask.shape[1] - row.sum()) for row in mask]
        ids, mask, labels, expected = (
            torch.stack([row.roll(shift, 0) for row, shift in zip(golden[name], shifts)])
            for name in ("input_ids", "attention_mask", "labels", "loreft.logits")
        )
    else:
        labels, expected = golden["labels"], golden["loreft.logits"]
    got = adapted.model(input_ids=ids, attention_mask=mask, labels=labels).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [True, False], ids=["with cache", "without"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "two"])
def test_generates_what_pyreft_does(tied, cache):
    golden, adapted, _ = _with_their_weights("loreft", tied)
    key = "loreft" if tied else "loreft-untied"
    for row, n in enumerate((9, 5)):
        ids = golden["input_ids"][row : row + 1, :n]
        answer = adapted.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=28, use_cache=cache)
        assert torch.equal(answer[0, n:], golden[f"{key}.generated.{row}"])


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"num_beams": 3, "use_cache": False},
    ],
    ids=lambda how: " ".join(how),
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_way_to_generate_edits_the_prompt_alone(family, how):
    model = backbone(family, "causal_lm")
    adapted = peftlib.attach(model, "loreft", rank=4, first=2, last=2)
    perturb(adapted)
    one = {name: tensor[1:2] for name, tensor in inputs(family).items()}
    plain = {"max_new_tokens": 5, "do_sample": False, "num_beams": how.get("num_beams", 1)}
    expected = model.generate(**one, **plain)
    assert torch.equal(model.generate(**one, **plain | how), expected)
    padded = {name: torch.nn.functional.pad(tensor, (3, 0)) for name, tensor in one.items()}
    if "cache_implementation" not in how:
        assert torch.equal(model.generate(**padded, **plain | how)[:, 3:], expected)
    else:  # there transformers hands over a ready-made mask, once there is padding
        with pytest.raises(UnsupportedError, match=r"\(batch, tokens\)"):
            model.generate(**padded, **plain | how)
    # After generate() the whole input is the prompt again.
    last = adapted.host.anatomy.layers[0].module.loreft.tokens
    model(input_ids=expected)
    assert last.now.last.flatten().tolist()[-2:] == [True, True]


def test_a_prompt_in_pieces_is_refused():
    adapted = peftlib.attach(backbone("llama", "causal_lm"), "loreft")
    with pytest.raises(UnsupportedError, match=r"first 4 of 12 alone.*prefill_chunk_size"):
        adapted.model.generate(torch.ones(1, 12, dtype=torch.long), max_new_tokens=2, prefill_chunk_size=4)


def test_encoder_decoder_models_are_edited_in_the_encoder():
    adapted = peftlib.attach(backbone("t5", "seq2seq"), "loreft")
    assert all(".encoder." in f".{name}" for name in adapted.trainable())
    assert adapted.count().method == 2 * (2 * 8 * 32 + 8)


@pytest.mark.parametrize(
    ("name", "options", "trained"),
    [
        ("llama-7b", {}, 2_097_408),
        ("llama-13b", {}, 3_277_120),
        ("llama-7b", {"rank": 4, "first": 5, "last": 5, "layers": (3, 9, 18, 24), "tied": False}, 262_176),
    ],
)
def test_published_counts(name, options, trained):
    adapted = peftlib.attach(backbones.shapes(name, head="causal_lm"), "loreft", **options)
    assert adapted.count().method == trained


@pytest.mark.parametrize("options", [{"first": 0}, {"last": 0}, {}])
def test_two_edits_only_where_there_are_two_kinds_of_tokens(options):
    adapted = peftlib.attach(backbone("bert"), "loreft", tied=False, **options)
    assert adapted.count().method == (1 if options else 2) * 2 * (2 * 8 * 32 + 8)


def test_rows_stay_orthonormal_in_training_and_under_weight_decay():
    """With weight decay torch's own parametrization loses the diagonal that it keeps its signs in."""
    adapted = peftlib.attach(backbone("bert"), "loreft", rank=8)
    edit = adapted.host.anatomy.layers[0].module.loreft
    before = edit.R().detach()
    train(adapted, batch("bert"), steps=10, rate=0.05, weight_decay=1.0)
    R = edit.R().detach()
    assert (R - before).norm() > 0.5
    torch.testing.assert_close(R @ R.T, torch.eye(8), atol=1e-5, rtol=0)


@torch.no_grad()
def test_reflections_are_those_of_torch():
    R = Orthonormal(5, 12).double()
    R.V.normal_(generator=torch.Generator().manual_seed(0))
    vectors = R.V.T.tril(-1)
    expected = torch.linalg.householder_product(vectors, 2 / (1 + vectors.square().sum(0)))
    torch.testing.assert_close(R().T, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_starts():
    """R uniformly distributed (so that R^T R is r / d of the identity in the mean), W and b as a linear layer's, or b
    alone in [0, 1)."""
    torch.manual_seed(0)
    mean = torch.stack([(lambda R: R.T @ R)(Orthonormal(2, 6)()) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, torch.eye(6) / 3, atol=0.03, rtol=0)
    for form, (orthonormal, maps, _) in FORMS.items():
        edit = peftlib.attach(backbone("bert"), "loreft", form=form).host.anatomy.layers[0].module.loreft
        bound = 1 / 32**0.5
        for tensor in (edit.W, edit.b) if maps else ():
            assert 0.5 * bound < float(tensor.abs().max()) <= bound
        if not maps:
            assert edit.W is None
            assert 0 <= float(edit.b.min()) < float(edit.b.max()) < 1
            assert float(edit.b.max()) > bound
        gram = edit.R() @ edit.R().T
        assert torch.allclose(gram, torch.eye(8), atol=1e-5) == orthonormal


def test_dropout_is_on_the_edited_states():
    model = backbone("bert")
    adapted = peftlib.attach(model, "loreft", first=1, last=1, dropout=0.5)
    layer, data = adapted.host.anatomy.layers[-1].module, inputs("bert")
    seen = []
    layer.register_forward_hook(
        lambda module, args, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    adapted.model.train()
    model(**data)
    zeros = (seen[0] == 0).float().mean(-1)
    for row, mask in enumerate(data["attention_mask"].tolist()):
        columns = [column for part in tokens_of(mask, 1, 1) for column in part]
        assert all(0.2 < zeros[row, column] < 0.8 for column in columns)
        assert zeros[row].count_nonzero() == len(columns)
    model.eval()
    assert torch.equal(logits(model, **data), logits(model, **data))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 33}, TargetError, "rank=33 does not fit hidden states of size 32"),
        ({"layers": (0, 2)}, TargetError, r"layers=\(0, 2\) .* 0 to 1"),
        ({"layers": ()}, ConfigError, "layers is empty"),
        ({"first": 0, "last": 0}, ConfigError, "last=0"),
        ({"form": "reft"}, ConfigError, "form='reft' is not known.*direft"),
    ],
)
def test_refused(options, error, match):
    model = backbone("bert")
    with pytest.raises(error, match=match):
        peftlib.attach(model, "loreft", **options)
    peftlib.attach(model, "loreft")


def test_a_ready_made_mask_is_refused():
    model = backbone("bert")
    peftlib.attach(model, "loreft")
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(UnsupportedError, match=r"loreft .*\(1, 1, 4, 4\)"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=mask)


# What is published

COMMONSENSE = "stanfordnlp/pyreft, examples/loreft/README.md, commonsense: -l all -r 8 -p f7+l7 --share_weights"
LAYER = "stanfordnlp/pyreft, pyreft/interventions.py, LoreftIntervention"

FACTS = Facts(
    "loreft",
    Default("rank", 8, COMMONSENSE),
    Default("first", 7, COMMONSENSE),
    Default("last", 7, COMMONSENSE),
    Default("layers", None, COMMONSENSE),
    Default("tied", True, COMMONSENSE),
    Default("dropout", 0.0, f"{COMMONSENSE} --dropout 0.00"),
    Default("form", "loreft", f"{COMMONSENSE} -type LoreftIntervention"),
    Start("*.loreft.W", uniform(lambda fan_in: fan_in**-0.5), f"{LAYER}: torch's Linear"),
    Trains(("*.R.V", "*.loreft.W", "*.loreft.b"), LAYER),
    Count("llama-7b", 32 * (2 * 8 * 4096 + 8), "table 1: 0.031 % of 6.7 billion", percent="0.031"),
    Count("roberta-base", 12 * (2 * 8 * 768 + 8), "2 r d + r a layer"),
    Count("t5-base", 12 * (2 * 8 * 768 + 8), "2 r d + r a layer of the encoder"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
