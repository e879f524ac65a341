"""The tiny models: every family, with the special tokens and heads that the real ones have."""

import pytest
import torch

from peftlib import backbones
from peftlib.backbones import tiny
from peftlib.errors import UnknownNameError, UnsupportedError

FAMILIES = list(tiny.FAMILIES)
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "distilbert"}
SEQ2SEQ = {"t5", "mt5", "bart"}


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_classifies_a_padded_batch_like_single_texts(family):
    """Padding, the end token that pooling looks for, and the padding id of config and tokenizer fit together."""
    backbone = backbones.load(f"tiny-{family}", num_labels=3)
    texts = ["the movie was great", "a boring film with a weak plot and some dreadful dialogue"]
    batch = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = backbone.model(**batch).logits
        alone = torch.cat([backbone.model(**backbone.tokenizer([t], return_tensors="pt")).logits for t in texts])
    assert together.shape == (2, 3)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_spells_any_text_and_keeps_words_whole(family):
    tokenizer = backbones.load(f"tiny-{family}").tokenizer
    plain = tokenizer("The movie, GREAT zebra 42!", add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(plain)
    assert tokens[:4] == ["the", "movie", ",", "great"]
    assert tokenizer.unk_token_id not in plain
    assert tokenizer.decode(plain) == "the movie, great zebra 42!"
    assert len(tokenizer) <= 256
    config = backbones.load(f"tiny-{family}").model.config
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    assert config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("family", "single", "pair"),
    [
        ("bert", "[CLS] good [SEP]", "[CLS] good [SEP] bad [SEP]"),
        ("roberta", "<s> good </s>", "<s> good </s> </s> bad </s>"),
        ("bart", "<s> good </s>", "<s> good </s> </s> bad </s>"),
        ("t5", "good </s>", "good </s> bad </s>"),
        ("llama", "<s> good", "<s> good bad"),
        ("opt", "</s> good", "</s> good </s> bad"),
        ("gpt2", "good", "good bad"),
    ],
)
def test_special_tokens_stand_where_the_family_has_them(family, single, pair):
    tokenizer = tiny.tokenizer(family)
    assert " ".join(tokenizer.convert_ids_to_tokens(tokenizer("good").input_ids)) == single
    assert " ".join(tokenizer.convert_ids_to_tokens(tokenizer("good", "bad").input_ids)) == pair


def test_bert_pairs_have_token_types():
    encoded = tiny.tokenizer("bert")("good", "bad film")
    assert encoded.token_type_ids == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_body_is_the_same_for_every_seed_and_head(family):
    one = backbones.load(f"tiny-{family}", seed=1)
    two = backbones.load(f"tiny-{family}", seed=2)
    base = backbones.load(f"tiny-{family}", head="base")
    body = _state(one.model.base_model)
    assert all(torch.equal(body[k], v) for k, v in _state(two.model.base_model).items())
    shared = [k for k in base.model.state_dict() if k in body]
    assert len(shared) >= len(body)
    assert all(torch.equal(body[k], base.model.state_dict()[k]) for k in shared)
    fresh = dict(one.model.named_parameters())
    assert one.fresh
    assert all(n in fresh for n in one.fresh)
    weights = [n for n in one.fresh if n.endswith("weight")]
    assert any(not torch.equal(fresh[n], dict(two.model.named_parameters())[n]) for n in weights)
    assert one.fingerprint == two.fingerprint == base.fingerprint


def test_biases_and_norms_are_not_at_their_usual_start():
    body = backbones.load("tiny-bert").model.base_model
    vectors = [p for p in body.parameters() if p.dim() == 1]
    assert vectors
    assert all(p.std() > 0.01 for p in vectors)


def test_fingerprints_differ_between_families():
    assert len({backbones.load(f"tiny-{f}").fingerprint for f in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_heads(family):
    head = "masked_lm" if family in ENCODERS else "seq2seq" if family in SEQ2SEQ else "causal_lm"
    backbone = backbones.load(f"tiny-{family}", head=head)
    batch = backbone.tokenizer(["the movie was great"], return_tensors="pt")
    labels = batch["input_ids"].clone()
    loss = backbone.model(**batch, labels=labels).loss
    assert torch.isfinite(loss)
    assert loss > 0
    if head != "masked_lm":
        out = backbone.model.generate(**batch, max_new_tokens=5, min_new_tokens=2, do_sample=False)
        assert out.shape[0] == 1
        assert out.shape[1] >= 3
        assert isinstance(backbone.tokenizer.decode(out[0]), str)


def test_grouped_query_families_have_two_key_value_heads():
    for family in ("llama", "mistral", "qwen2"):
        config = backbones.load(f"tiny-{family}").model.config
        assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_reach_at_least_128(family):
    backbone = backbones.load(f"tiny-{family}")
    ids = torch.full((1, 200), backbone.tokenizer.convert_tokens_to_ids("movie"))
    if family in ("t5", "mt5", "bart"):
        ids[0, -1] = backbone.tokenizer.eos_token_id
    assert backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 2)


def test_dropout_is_as_the_family_has_it_or_as_asked():
    own = backbones.load("tiny-bert").model.config
    assert own.hidden_dropout_prob == own.attention_probs_dropout_prob == 0.1
    for family in FAMILIES:
        model = backbones.load(f"tiny-{family}", dropout=0.0).model
        assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert backbones.load("tiny-roberta", dropout=0.3).model.config.hidden_dropout_prob == 0.3


def test_regression_dtype_and_evaluation_mode():
    backbone = backbones.load("tiny-bert", num_labels=1, dtype=torch.bfloat16)
    assert not backbone.model.training
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    batch = backbone.tokenizer(["good", "bad"], return_tensors="pt")
    out = backbone.model(**batch, labels=torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert out.logits.shape == (2, 1)
    assert torch.isfinite(out.loss)


def test_unknown_names_and_heads():
    with pytest.raises(UnknownNameError, match="did you mean 'tiny-bert'"):
        backbones.load("tiny-brt")
    with pytest.raises(UnknownNameError, match="causal_lm"):
        backbones.load("tiny-bert", head="causal")
    with pytest.raises(UnknownNameError, match="embedded, tiny, folder, hub"):
        backbones.load("tiny-bert", source="web")
    with pytest.raises(UnsupportedError, match="no 'seq2seq' head; it has: classification"):
        backbones.load("tiny-bert", head="seq2seq")
