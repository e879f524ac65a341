"""P-tuning: HF peft's encoder with the same weights, an encoder that is gone after training, prompts in a template."""

import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model

import peftlib
from peftlib import anatomy, backbones
from peftlib.conformance.case import batch, train
from peftlib.errors import LoadError, TargetError, UnknownNameError, UnsupportedError
from peftlib.mechanisms import call
from peftlib.mechanisms.template import Layout, Template
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, kaiming_uniform, normal, uniform
from tests.methods.helpers import backbone, inputs


def attached(model, **options):
    """All vectors in front, as HF peft has them, unless ``after`` says otherwise."""
    adapted = peftlib.attach(model, "p_tuning", **({"length": 5, "after": 0} | options))
    return adapted, adapted.method.prompt


@torch.no_grad()
def logits(model, **given):
    return model.eval()(**given).logits


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        ("bert", "classification", "SEQ_CLS"),
        ("roberta", "classification", "SEQ_CLS"),
        ("gpt2", "causal_lm", "CAUSAL_LM"),
        ("llama", "causal_lm", "CAUSAL_LM"),
        ("t5", "seq2seq", "SEQ_2_SEQ_LM"),
    ],
)
@pytest.mark.parametrize("hidden", [16, 24])
def test_the_same_weights_give_hf_pefts_logits_and_count(family, head, task, hidden):
    model = backbone(family, head)
    # HF peft keeps a method of the model that transformers 5 no longer has, for its own generate().
    model._prepare_encoder_decoder_kwargs_for_generation = None
    config = PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=5,
        num_transformer_submodules=1,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=hidden,
    )
    theirs = get_peft_model(model, config).eval()
    encoder = theirs.prompt_encoder["default"]
    ours, prompt = attached(backbone(family, head), hidden=hidden)
    with torch.no_grad():
        prompt.maker.embedding.copy_(encoder.embedding.weight)
    prompt.maker.lstm.load_state_dict(encoder.lstm_head.state_dict())
    prompt.maker.mlp.load_state_dict(encoder.mlp_head.state_dict())
    data = inputs(family)
    if head == "seq2seq":
        data["decoder_input_ids"] = data["input_ids"]
    got = logits(ours.model, **data)
    torch.testing.assert_close(got, logits(theirs, **data)[:, -got.shape[1] :], atol=1e-5, rtol=0)
    assert ours.count().method == sum(p.numel() for p in encoder.parameters())


def test_after_training_there_are_plain_embeddings_and_no_encoder():
    ours, prompt = attached(backbone("bert"))
    assert prompt.maker.lstm.hidden == 16  # half the width, as in the original
    size = ours.count()
    train(ours, batch("bert"), steps=3)
    assert prompt.maker is None
    assert not any("lstm" in name or "mlp" in name for name in ours.model.state_dict())
    assert set(ours.trainable()) == {"bert.prompt.vectors", *ours.head_names}
    assert ours.count().method == 5 * 32 < size.method
    assert ours.count().stored == size.stored
    before = logits(ours.model, **inputs("bert"))
    as_prompt = peftlib.attach(backbone("bert"), "prompt_tuning", length=5)
    as_prompt.method.load_state(ours.method.state() | dict(as_prompt._head))
    with torch.no_grad():
        for name, parameter in ours._head.items():
            as_prompt._head[name].copy_(parameter)
    assert torch.equal(logits(as_prompt.model, **inputs("bert")), before)


def test_what_is_saved_amid_training_is_what_the_encoder_gives(tmp_path):
    ours, prompt = attached(backbone("bert"))
    folder = ours.save(tmp_path / "a")
    loaded = peftlib.load(backbone("bert"), folder)
    with torch.no_grad():
        assert torch.equal(loaded.method.prompt.vectors, prompt.current())
    assert torch.equal(logits(loaded.model, **inputs("bert")), logits(ours.model, **inputs("bert")))
    assert prompt.maker is not None
    other, _ = attached(backbone("bert"), length=4)
    with pytest.raises(LoadError, match=r"has shape \(5, 32\) in the file, \(4, 32\) here"):
        other.method.load_state(ours.state())


def test_a_loop_without_the_lifecycle_would_keep_the_encoder_and_is_refused():
    ours, _ = attached(backbone("bert"))
    ours.model.train()
    with pytest.raises(peftlib.errors.StateError, match="on_train_end"):
        ours.model(**batch("bert"))


# The template


def written(tokens, spots):
    """A row with v0, v1, ... before the tokens at these places, by hand."""
    row = []
    for place, token in enumerate([*tokens, None]):
        row += [f"v{k}" for k, spot in enumerate(spots) if spot == place]
        row += [] if token is None else [token]
    return row


@pytest.mark.parametrize(
    ("ids", "mask", "spots"),
    [
        ([2, 7, 8, 3], [1, 1, 1, 1], [1, 1, 3, 3, 3]),
        ([2, 7, 8, 3, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 3, 3, 3]),
        ([0, 0, 2, 7, 8, 3], [0, 0, 1, 1, 1, 1], [3, 3, 5, 5, 5]),
        ([2, 7, 3, 9, 9, 3, 0], [1, 1, 1, 1, 1, 1, 0], [1, 1, 2, 5, 5]),
        ([2, 7, 3, 3, 9, 3, 3], [1, 1, 1, 1, 1, 1, 0], [1, 1, 2, 5, 5]),
        ([2, 7, 8, 9], [1, 1, 1, 1], [1, 1, 4, 4, 4]),
        ([2, 7, 8, 0], [1, 1, 1, 0], [1, 1, 3, 3, 3]),
    ],
    ids=["single", "padded", "left", "pair", "padding is [SEP]", "without [SEP]", "without [SEP], padded"],
)
def test_vectors_stand_behind_cls_and_before_the_seps(ids, mask, spots):
    template = Template(before=2, between=1, after=2, sep=3)
    found = template.spots(torch.tensor([ids]), torch.tensor([mask]))
    assert found.tolist() == [spots]
    layout = Layout(found, len(ids))
    codes = {f"v{k}": -1 - k for k in range(5)}
    merged = layout.merge(torch.tensor([ids]), torch.tensor([[codes[f"v{k}"] for k in range(5)]]))
    assert merged.tolist() == [[codes.get(token, token) for token in written(ids, spots)]]
    assert layout.at(layout.text, merged).tolist() == [ids]
    assert layout.at(layout.vectors, merged).tolist() == [list(codes.values())]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_vectors_that_are_words_read_as_a_text_with_these_words(family):
    loaded = backbones.load(f"tiny-{family}", head="masked_lm", dropout=0.0)
    tokenizer = loaded.tokenizer
    words = ["great", "film", "and", "so"]
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    data = tokenizer(["good cast", "a weak plot"], ["fine", "it was the dull one"], padding=True, return_tensors="pt")
    longer = tokenizer(
        ["great film good cast and", "great film a weak plot and"], ["fine so", "it was the dull one so"], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    theirs = logits(loaded.model, **longer)
    inserted = torch.isin(longer["input_ids"], torch.tensor(ids))
    theirs = theirs[~inserted].view(*data["input_ids"].shape, -1)
    _, prompt = attached(loaded.model, length=4, between=1, after=1)
    prompt.keep()
    with torch.no_grad():
        prompt.vectors.copy_(anatomy.of(loaded.model).embeddings.weight[ids])
    real = data["attention_mask"].bool()
    torch.testing.assert_close(logits(loaded.model, **data)[real], theirs[real], atol=1e-5, rtol=0)
    positions = torch.arange(data["input_ids"].shape[1])[None] + anatomy.of(loaded.model).first_position
    again = logits(loaded.model, **data, position_ids=positions)
    torch.testing.assert_close(again[real], theirs[real], atol=1e-5, rtol=0)


DECODERS = ("gpt2", "llama", "opt")


def decoder(family, head="causal_lm"):
    loaded = backbones.load(f"tiny-{family}", head=head, dropout=0.0)
    ids = [loaded.tokenizer.convert_tokens_to_ids(word) for word in ("great", "film", "and", "so")]
    return loaded.model, loaded.tokenizer, ids


def rows(tokenizer, lists, side="right"):
    """Rows of ids, padded."""
    tokenizer.padding_side = side
    return dict(tokenizer.pad({"input_ids": lists}, return_tensors="pt"))


def with_words(model, ids):
    """P-tuning whose four vectors are words, two before the text and two behind it."""
    adapted, prompt = attached(model, length=4, after=2)
    prompt.keep()
    with torch.no_grad():
        prompt.vectors.copy_(anatomy.of(model).embeddings.weight[ids])
    return adapted


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_generates_as_from_the_text_with_these_words_around_it(family):
    model, tokenizer, words = decoder(family)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("good cast", "a weak plot and dull music")]
    short = rows(tokenizer, texts, "left")
    long = rows(tokenizer, [[*words[:2], *text, *words[2:]] for text in texts], "left")
    ways = ({}, {"num_beams": 3}, {"use_cache": False})
    common = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    expected = [model.generate(**long, **way, **common)[:, long["input_ids"].shape[1] :] for way in ways]
    with_words(model, words)
    for way, wanted in zip(ways, expected):
        assert torch.equal(model.generate(**short, **way, **common)[:, short["input_ids"].shape[1] :], wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_learns_an_answer_from_the_last_vector(family):
    model, tokenizer, words = decoder(family)
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("good cast", "a weak plot and dull music")]
    answer = [tokenizer.convert_tokens_to_ids(word) for word in ("the", "movie")]

    def labelled(texts):
        data = rows(tokenizer, [text + answer for text in texts])
        labels = data["input_ids"].clone()
        for row, text in zip(labels, texts):
            row[: len(text)] = -100
            row[len(text) + len(answer) :] = -100
        return data | {"labels": labels}

    with torch.no_grad():
        expected = model.eval()(**labelled([[*words[:2], *text, *words[2:]] for text in texts])).loss
        adapted = with_words(model, words)
        torch.testing.assert_close(model(**labelled(texts)).loss, expected, atol=1e-6, rtol=0)
        # What is an answer as a whole has no text to stand behind.
        whole = rows(tokenizer, texts)
        got = model(**whole, labels=whole["input_ids"]).logits
        adapted.detach()
        front = rows(tokenizer, [words + text for text in texts])
        torch.testing.assert_close(got[0, :2], model(**front).logits[0, 4:6], atol=1e-5, rtol=0)


def test_a_decoders_classification_head_reads_the_last_vector():
    model, tokenizer, words = decoder("gpt2", "classification")
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("good cast", "a weak plot and dull music")]
    expected = logits(model, **rows(tokenizer, [[*words[:2], *text, *words[2:]] for text in texts]))
    with_words(model, words)
    torch.testing.assert_close(logits(model, **rows(tokenizer, texts)), expected, atol=1e-6, rtol=0)


def test_a_masked_language_model_answers_at_the_mask_with_words():
    loaded = backbones.load("tiny-bert", head="masked_lm", dropout=0.0)
    model, tokenizer = loaded.model, loaded.tokenizer
    words = tokenizer.convert_tokens_to_ids(["great", "film", "and", "so"])
    answers = tuple(tokenizer.convert_tokens_to_ids(["good", "weak"]))
    texts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("good cast", "a weak plot and dull music")]
    cls, sep, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    written = [[cls, *words[:2], mask, words[2], *text, words[3], sep] for text in texts]
    expected = logits(model, **rows(tokenizer, written))[:, 3][:, list(answers)]
    adapted, prompt = attached(model, length=4, after=1, mask_at=2, answer_token_ids=answers)
    prompt.keep()
    with torch.no_grad():
        prompt.vectors.copy_(anatomy.of(model).embeddings.weight[words])
        out = model.eval()(**rows(tokenizer, [[cls, *t, sep] for t in texts]), labels=torch.tensor([1, 0]))
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(expected, torch.tensor([1, 0])))
    assert adapted.method.classifies and not adapted.head_names


def test_by_default_three_vectors_stand_behind_the_text():
    for family, head in (("bert", "classification"), ("gpt2", "causal_lm"), ("t5", "seq2seq")):
        model = backbone(family, head)
        seen = []
        stack = anatomy.of(model).stack_inputs(anatomy.of(model).stacks[0])
        adapted = peftlib.attach(model, "p_tuning")
        call.around(stack).before.append(lambda m, a, k, seen=seen: seen.append(k["inputs_embeds"]))
        ids = torch.tensor([[5, 6, 7, 8]])
        given = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
        logits(model, **given)
        vectors = adapted.method.prompt.current().detach()
        behind = {"bert": 3, "gpt2": 3, "t5": 0}[family]
        torch.testing.assert_close(seen[0][0, 13 - behind :], vectors[9 - behind :])


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="hidden=0"):
        peftlib.config("p_tuning", hidden=0)
    with pytest.raises(ConfigError, match="between=3 and after=3 are more than the length=5"):
        peftlib.config("p_tuning", length=5, between=3, after=3)
    with pytest.raises(UnknownNameError, match="'front'"):
        peftlib.config("p_tuning", position="frnt")
    with pytest.raises(UnsupportedError, match=r"one stack.*Put all of them in front"):
        attached(backbone("t5"), after=1)
    with pytest.raises(UnsupportedError, match=r"between=1 .* is a decoder, whose rows are one text"):
        attached(backbone("gpt2"), between=1)
    with pytest.raises(ConfigError, match=r"mask_at=4 vectors stand before the \[MASK\].* only 3"):
        peftlib.config("p_tuning", length=6, mask_at=4, answer_token_ids=(5, 6))
    with pytest.raises(UnsupportedError, match="BertForSequenceClassification has none"):
        attached(backbone("bert"), answer_token_ids=(5, 6))
    with pytest.raises(TargetError, match=r"one id below .* for each of the model's 2 labels"):
        attached(backbone("bert", "masked_lm"), answer_token_ids=(5, 6, 7))
    model = backbone("bert")
    del model.config.sep_token_id
    with pytest.raises(UnsupportedError, match=r"model\.config\.sep_token_id"):
        attached(model, after=1)
    ours, _ = attached(backbone("bert"), after=1)
    with pytest.raises(UnsupportedError, match="call it with input_ids"):
        logits(ours.model, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(UnsupportedError, match=r"252 tokens and 5 trained positions need 257.*has 256"):
        logits(ours.model, input_ids=torch.full((1, 252), 9))


# The published facts

LAMA = "THUDM/P-tuning, LAMA/p_tuning/prompt_encoder.py, PromptEncoder"
H = 16  # half of the tiny models' width

FACTS = Facts(
    "p_tuning",
    Default("length", 9, "THUDM/P-tuning, LAMA/cli.py: template (3, 3, 3)"),
    Default("mask_at", 3, "THUDM/P-tuning, LAMA/cli.py: template (3, 3, 3)"),
    Default("dropout", 0.0, "THUDM/P-tuning, LAMA/cli.py: lstm_dropout"),
    Start("*.maker.embedding", normal(1.0), f"{LAMA}: nn.Embedding"),
    Start("*.maker.lstm.*", uniform(H**-0.5), f"{LAMA}: nn.LSTM"),
    Start("*.maker.mlp.*.weight", kaiming_uniform(), f"{LAMA}: nn.Linear"),
    Trains(("*.maker.embedding", "*.maker.lstm.*", "*.maker.mlp.*"), f"{LAMA}; the backbone is frozen"),
    # Embeddings; two layers of an LSTM each way with h = 384; two maps of 768.
    Count(
        "roberta-base",
        9 * 768 + 2 * 4 * 384 * (768 + 384 + 2) + 2 * 4 * 384 * (768 + 384 + 2) + 2 * 769 * 768,
        LAMA,
    ),
    Count("t5-base", 8_278_272, f"{LAMA}; vectors for the encoder, as many as on RoBERTa-base"),
    Count("llama-7b", 9 * 4096 + 4 * 4 * 2048 * (4096 + 2048 + 2) + 2 * 4097 * 4096, LAMA),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
