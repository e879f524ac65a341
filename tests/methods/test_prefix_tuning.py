"""Prefix tuning: the keys and values that every query sees, the MLP behind them, and HF peft's version."""

import copy

import peft
import pytest
import torch

import peftlib
from peftlib import anatomy, backbones
from peftlib.errors import LoadError, TargetError, UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal
from tests.methods.helpers import backbone, inputs, perturb

CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2")


def attached(model, **options):
    adapted = peftlib.attach(model, "prefix_tuning", **({"length": 5, "reparametrize": False} | options))
    return adapted, list(adapted.host.paths().values())


@torch.no_grad()
def logits(model, **given):
    model.eval()
    return model(**given).logits


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        ("bert", "classification", "SEQ_CLS"),
        ("roberta", "classification", "SEQ_CLS"),
        ("electra", "classification", "SEQ_CLS"),
        ("gpt2", "causal_lm", "CAUSAL_LM"),
        ("opt", "causal_lm", "CAUSAL_LM"),
        ("llama", "causal_lm", "CAUSAL_LM"),
        ("mistral", "causal_lm", "CAUSAL_LM"),
        ("qwen2", "causal_lm", "CAUSAL_LM"),
    ],
)
def test_the_same_prefix_gives_hf_pefts_logits_loss_and_count(family, head, task):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        backbone(family, head), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5)
    ).eval()
    embedding = theirs.prompt_encoder["default"].embedding.weight
    ours, prefixes = attached(backbone(family, head))
    heads, length, width = prefixes[0].key.shape
    pairs = embedding.detach().view(length, len(prefixes), 2, heads, width).permute(1, 2, 3, 0, 4)
    with torch.no_grad():
        for prefix, (key, value) in zip(prefixes, pairs, strict=True):
            prefix.key.copy_(key)
            prefix.value.copy_(value)
    batch = inputs(family)
    if head == "classification":
        batch["labels"] = torch.tensor([0, 1, 1])
    else:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected, got = theirs(**batch), ours.model(**batch)
    # OPT puts padding at its very first position, HF peft's cache included, and nobody sees it.
    told = batch["attention_mask"].bool() if task == "CAUSAL_LM" else slice(None)
    torch.testing.assert_close(got.logits[told], expected.logits[told], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert ours.count().method == embedding.numel()


def test_t5s_decoder_alone_gives_hf_pefts_logits():
    """HF peft's split of its tensor gives decoder layer i the keys and values of layer 2i (modulo the layers) and drops
    what is meant for cross-attention; its relative bias counts the prefix."""
    model = backbone("t5", "seq2seq")
    ours, prefixes = attached(copy.deepcopy(model), attentions=("decoder",), relative_bias=True)
    # HF peft keeps a method of the model that transformers 5 no longer has, for its own generate().
    model._prepare_encoder_decoder_kwargs_for_generation = None
    theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)).eval()
    embedding = theirs.prompt_encoder["default"].embedding.weight.detach()
    pairs = embedding.view(5, len(prefixes), 2, 4, 8).permute(1, 2, 3, 0, 4)
    with torch.no_grad():
        for i, prefix in enumerate(prefixes):
            key, value = pairs[2 * i % len(prefixes)]
            prefix.key.copy_(key)
            prefix.value.copy_(value)
    batch = inputs("t5")
    batch["decoder_input_ids"] = batch["input_ids"]
    torch.testing.assert_close(logits(ours.model, **batch), logits(theirs, **batch), atol=1e-5, rtol=0)
    assert ours.count().method == embedding.numel()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", *CAUSAL])
def test_a_prefix_made_of_a_text_is_that_text_before_the_input(family):
    """Causal backbones answer as if the text stood in front; keys and values of encoders are those of the text."""
    batch = inputs(family, 1)
    text = batch["input_ids"][:, 1:4]
    if family in CAUSAL:
        longer = torch.cat([text, batch["input_ids"]], dim=1)
        expected = logits(backbone(family, "causal_lm"), input_ids=longer)[:, 3:]
        ours, _ = attached(backbone(family, "causal_lm"), length=3, init_token_ids=tuple(text[0].tolist()))
        torch.testing.assert_close(logits(ours.model, **batch), expected, atol=1e-5, rtol=0)
        return
    model = backbone(family)
    site = anatomy.of(model).layers[0].sites["attention.value"]
    kept = []
    handle = site.module.register_forward_hook(lambda module, args, output: kept.append(output))
    model(input_ids=text)
    handle.remove()
    ours, prefixes = attached(model, length=3, init_token_ids=tuple(text[0].tolist()))
    expected = kept[0][0].view(3, *prefixes[0].value.shape[::2]).transpose(0, 1)
    assert torch.equal(prefixes[0].value, expected)
    assert not hasattr(anatomy.of(model).layers[0].attention, "recorder")


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "bart"])
def test_a_prefix_of_zero_keys_and_values_only_takes_attention_away(family):
    """With value 0, an attention's output shrinks by the share of its weights that the prefix draws."""
    model = backbone(family)
    layer = anatomy.of(model).layers[0]
    seen = []
    first = {k: v[:1] for k, v in inputs(family).items()}
    output = layer.sites["attention.output"].module
    output.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model, **first)
    ours, prefixes = attached(model, length=2, shift_positions=False)
    with torch.no_grad():
        for prefix in prefixes:
            prefix.key.zero_()
            prefix.value.zero_()
    logits(ours.model, **first)
    plain, drawn = (s[0, -1] for s in seen)
    ratios = (drawn / plain).view(anatomy.of(model).heads, -1)
    assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), atol=1e-4)
    assert ((ratios > 0) & (ratios < 1)).all()


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart"])
def test_generation_with_beams_and_left_padding_does_not_depend_on_the_cache(family):
    head = "seq2seq" if family in ("t5", "bart") else "causal_lm"
    loaded = backbones.load(f"tiny-{family}", head=head, dropout=0.0)
    loaded.tokenizer.padding_side = "left"
    ours, _ = attached(loaded.model)
    perturb(ours, std=1.0)
    texts = ["good cast", "a boring film with a weak plot"]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    first, second = (ours.model.generate(**given, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(first, second)
    if head == "causal_lm":
        alone = loaded.tokenizer(texts[:1], return_tensors="pt")
        given = {"input_ids": alone["input_ids"], "attention_mask": alone["attention_mask"]}
        greedy = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        together = ours.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **greedy
        ).logits[0][0]
        assert torch.allclose(ours.model.generate(**given, **greedy).logits[0][0], together, atol=1e-5)


def test_positions_shift_with_the_prefix_or_not():
    batch = inputs("gpt2", 1)
    shifted, still = (attached(backbone("gpt2"), shift_positions=s)[0].model for s in (True, False))
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    assert torch.equal(logits(still, **batch, position_ids=positions + 5), logits(shifted, **batch))
    assert not torch.allclose(logits(still, **batch), logits(shifted, **batch), atol=1e-4)
    with pytest.raises(UnsupportedError, match=r"254 tokens and 5 trained positions need 259.*has 256"):
        shifted(input_ids=torch.full((1, 254), 9))
    still(input_ids=torch.full((1, 254), 9))


def test_the_mlp_is_the_papers_and_trains_but_is_not_stored(tmp_path):
    model = backbone("bert")
    ours, prefixes = attached(model, reparametrize=True, hidden=7)
    perturb(ours)
    d, m, layers, h = 32, 5, 2, 7
    assert ours.count().method == m * d + (d + 1) * h + 2 * layers * d * (h + 1)
    assert ours.count().stored == 2 * layers * m * d + ours.count().head
    shared, linear = prefixes[1].maker.trunk, prefixes[1].maker.linear
    hidden = torch.tanh(shared.embedding @ shared.linear.weight.T + shared.linear.bias)
    key, value = (hidden @ linear.weight.T + linear.bias).chunk(2, dim=1)
    name = "bert.encoder.layer.1.attention.self.prefix"
    for which, expected in (("key", key), ("value", value)):
        got = ours.state()[f"{name}.{which}"]
        assert torch.allclose(got, expected.view(m, 4, 8).transpose(0, 1), atol=1e-6)
    assert prefixes[0].maker.trunk is shared

    before = logits(model, **inputs("bert"))
    loaded = peftlib.load(backbone("bert"), ours.save(tmp_path / "a"))
    assert torch.equal(logits(loaded.model, **inputs("bert")), before)
    assert set(loaded.trainable()) == set(ours.state())
    loaded.model(**inputs("bert"), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in loaded.trainable().values())
    again = peftlib.load(backbone("bert"), loaded.save(tmp_path / "b"))
    assert torch.equal(logits(again.model, **inputs("bert")), before)


def test_encoder_decoders_have_prefixes_in_three_attentions_with_an_mlp_each():
    for family in ("t5", "bart"):
        ours, prefixes = attached(backbone(family))
        assert len(prefixes) == 6
        assert ours.count().method == 3 * 2 * 2 * 5 * 32
        made, _ = attached(backbone(family), reparametrize=True, hidden=7)
        assert made.count().method == 3 * (5 * 32 + 33 * 7 + 2 * 2 * 32 * 8)
        only, prefixes = attached(backbone(family), attentions=("cross",))
        assert all("EncDecAttention" in path or "encoder_attn" in path for path in only.host.paths())
        assert len(prefixes) == 2


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_a_relative_bias_counts_a_prefix_as_tokens_before_the_text(family):
    """A decoder's prefix that is the keys and values of a text then stands for that text, also beside a cache."""
    model, first, text = backbone(family, "seq2seq"), (7, 30, 51, 12), torch.tensor([[9, 40, 22, 63, 8]])
    ids = torch.tensor([first])
    whole = logits(model, input_ids=ids, decoder_input_ids=torch.cat([ids, text], 1))[:, 4:]
    options = {"length": 4, "init_token_ids": first, "attentions": ("decoder",)}
    ours, _ = attached(model, relative_bias=True, **options)
    torch.testing.assert_close(logits(model, input_ids=ids, decoder_input_ids=text), whole, rtol=1e-5, atol=1e-5)
    before = model(input_ids=ids, decoder_input_ids=text[:, :3], use_cache=True)
    cached = logits(model, input_ids=ids, decoder_input_ids=text[:, 3:], past_key_values=before.past_key_values)
    torch.testing.assert_close(cached, whole[:, 3:], rtol=1e-5, atol=1e-5)
    model = copy.deepcopy(model)  # its prefixes ask its own bias
    twin = model.peftlib_adapted
    assert {id(p._counted_by[0]) for p in twin.host.paths().values()} <= {id(m) for m in model.modules()}
    ours.detach()
    attached(ours.model, **options)
    assert not torch.allclose(logits(ours.model, input_ids=ids, decoder_input_ids=text), whole, atol=1e-2)


def test_grouped_keys_and_values_have_grouped_prefixes():
    _, prefixes = attached(backbone("llama"))
    assert prefixes[0].key.shape == (2, 5, 8)


def test_a_stored_prefix_of_another_length_is_refused():
    four, five = (attached(backbone("bert"), length=m)[0] for m in (4, 5))
    with pytest.raises(LoadError, match=r"has shape \(4, 4, 8\) in the file, \(4, 5, 8\) here"):
        five.method.load_state(four.state())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="length=0"):
        peftlib.config("prefix_tuning", length=0)
    with pytest.raises(ConfigError, match="reparametrize=False"):
        peftlib.config("prefix_tuning", init_token_ids=(1,))
    with pytest.raises(UnknownNameError, match="did you mean 'decoder'"):
        peftlib.config("prefix_tuning", attentions=("decodr",))
    with pytest.raises(TargetError, match="it has encoder"):
        attached(backbone("bert"), attentions=("cross",))
    with pytest.raises(TargetError, match=r"relative_bias=True .* finds no relative position bias in BertFor"):
        attached(backbone("bert"), relative_bias=True)
    with pytest.raises(TargetError, match=r"attentions=\('cross',\) finds no relative position bias"):
        attached(backbone("t5"), attentions=("cross",), relative_bias=True)


# The published facts

LI = "XiangLi1999/PrefixTuning, gpt2/train_control.py, PrefixTuning"

FACTS = Facts(
    "prefix_tuning",
    Default("reparametrize", True, "section 4.3: the MLP"),
    Default("hidden", 512, f"{LI}: mid_dim"),
    Default("length", 20, "chosen here; theirs is 5 or 10 for table-to-text and 200 for summarization"),
    Default("shift_positions", True, f"{LI}: past_key_values, before which the text does not begin"),
    Default("attentions", ("encoder", "decoder", "cross"), "section 4.2 and seq2seq/prefixTuning.py"),
    Start("*.trunk.embedding", normal(1.0), f"{LI}: nn.Embedding"),
    Start("*.trunk.linear.weight", kaiming_uniform(), f"{LI}: nn.Linear"),
    Start("*.maker.linear.weight", kaiming_uniform(), f"{LI}: nn.Linear"),
    Start("*.prefix.key", normal(0.02), "He et al. 2022; theirs is N(0, 1)", {"reparametrize": False}),
    Start("*.prefix.value", normal(0.02), "He et al. 2022; theirs is N(0, 1)", {"reparametrize": False}),
    Trains(("*.maker.trunk.*", "*.prefix.maker.linear.*"), "section 4.3"),
    Trains(("*.prefix.key", "*.prefix.value"), "section 4.3, without the MLP", {"reparametrize": False}),
    # E_P, W and b; then W_l and b_l of each layer for keys and values.
    Count("roberta-base", 20 * 768 + 769 * 512 + 2 * 12 * 768 * 513, "section 4.3"),
    Count("t5-base", 3 * (20 * 768 + 769 * 512 + 2 * 12 * 768 * 513), "section 4.2: three kinds of attention"),
    Count("llama-7b", 20 * 4096 + 4097 * 512 + 2 * 32 * 4096 * 513, "section 4.3"),
    Count("roberta-base", 2 * 12 * 20 * 768, "what is stored", {"reparametrize": False}),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
