"""PASTA: the special tokens' hidden states move at every layer's input, and nothing else does, to the bit."""

import pytest
import torch

import peftlib
from peftlib import anatomy, backbones
from peftlib.errors import TargetError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Start, Trains, normal
from tests.methods.helpers import backbone, inputs, perturb

FAMILIES = ("bert", "roberta", "electra", "distilbert", "bart")


def texts(family, *pairs, side="right"):
    tokenizer = backbones.load(f"tiny-{family}").tokenizer
    tokenizer.padding_side = side
    return dict(tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt"))


def seen(model, data, **options):
    """What each layer of the first stack is given before and after PASTA, (B, n, d), and the attached vectors."""
    parts = anatomy.of(model)
    layers = [layer.module for layer in parts.layers if layer.stack == parts.stacks[0]]
    found = {layer: [] for layer in layers}

    def keep(module, args):
        found[module].append(args[0].detach().clone())

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    adapted = peftlib.attach(model, "pasta", **options)
    perturb(adapted)
    handles += [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        adapted.model.eval()(**data)
    for handle in handles:
        handle.remove()
    return [(*found[layer], layer.pasta.vectors.detach()) for layer in layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_special_tokens_move_by_their_vectors_and_all_others_stay_bit_for_bit(family, side):
    data = texts(family, ("good cast", "a weak plot"), ("the movie was great and so was the cast", "fine"), side=side)
    tokenizer = backbones.load(f"tiny-{family}").tokenizer
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    for before, after, vectors in seen(backbone(family), data):
        expected = before.clone()
        for row, ids in enumerate(data["input_ids"].tolist()):
            places = [place for place, token in enumerate(ids) if token in special]
            assert len(places) >= 3
            for vector, place in zip(vectors, places):
                expected[row, place] += vector
        assert torch.equal(after, expected)
        assert not torch.equal(after, before)


def test_rows_with_different_numbers_of_special_tokens_are_counted_each_for_itself():
    tokenizer = backbones.load("tiny-bert").tokenizer
    single, pair = tokenizer("good cast"), tokenizer("good cast", "fine")
    data = dict(tokenizer.pad([dict(pair), dict(single)], return_tensors="pt"))
    for before, after, vectors in seen(backbone("bert"), data):
        moved = (after - before).abs().sum(-1) > 0
        assert moved.tolist() == [[True, False, False, True, False, True], [True, False, False, True, False, False]]
        assert torch.allclose((after - before)[:, 3], vectors[1].expand(2, -1), atol=1e-5)


def test_padding_that_has_a_special_tokens_id_is_not_touched():
    data = {"input_ids": torch.tensor([[5, 6, 1, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    for before, after, _ in seen(backbone("llama"), data, token_ids=(1,)):
        assert ((after - before).abs().sum(-1) > 0).tolist() == [[False, False, True, False]]


def test_roberta_pairs_have_four_special_tokens():
    data = texts("roberta", ("good cast", "fine"))
    ids = data["input_ids"][0]
    for tokens in (3, 4):
        for before, after, _ in seen(backbone("roberta"), data, tokens=tokens):
            moved = ((after - before).abs().sum(-1) > 0)[0]
            assert moved.tolist() == [bool(t in (0, 2)) and i < len(ids) - 4 + tokens for i, t in enumerate(ids)]


def test_dropout_falls_on_what_is_added_alone_and_anew_for_every_token():
    model = backbone("bert").train()
    adapted = peftlib.attach(model, "pasta", dropout=0.5, std=1.0)
    layer = model.bert.encoder.layer[0]
    hidden = torch.randn(2, 4, 32)
    place = torch.tensor([[1, 0, 2, 0], [1, 0, 2, 0]])
    after = layer.pasta(hidden, place)
    added = (after - hidden).detach()
    for row in (0, 1):
        for column, index in ((0, 0), (2, 1)):
            vector = adapted.trainable()["bert.encoder.layer.0.pasta.vectors"][index].detach()
            kept = added[row, column].abs() > 1e-6
            assert 4 < kept.sum() < 28
            torch.testing.assert_close(added[row, column][kept], 2 * vector[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(after[:, [1, 3]], hidden[:, [1, 3]])
    assert not torch.equal(added[0], added[1])


def test_the_start_is_normal_or_at_the_backbone():
    adapted = peftlib.attach(backbones.load("tiny-bert", dropout=0.0).model, "pasta", tokens=200)
    vectors = next(p for n, p in adapted.trainable().items() if n.endswith("pasta.vectors"))
    assert 0.018 < vectors.std() < 0.022
    model, data = backbone("bert"), inputs("bert")
    before = model(**data).logits
    peftlib.attach(model, "pasta", std=0)
    assert torch.equal(model(**data).logits, before)


def test_the_pooler_is_frozen_as_in_the_reference_code():
    adapted = peftlib.attach(backbone("bert"), "pasta")
    assert not any("pooler" in name for name in adapted.trainable())


def test_token_ids_open_decoders_whose_generation_does_not_depend_on_the_cache():
    loaded = backbones.load("tiny-llama", head="causal_lm", dropout=0.0)
    adapted = peftlib.attach(loaded.model, "pasta", token_ids=(loaded.tokenizer.bos_token_id,), tokens=1)
    perturb(adapted)
    batch = loaded.tokenizer(["good cast", "a boring film"], padding=True, padding_side="left", return_tensors="pt")
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    first, second = (adapted.model.generate(**given, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(first, second)
    assert not torch.equal(first, backbone("llama", "causal_lm").generate(**given, **options))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "qwen2", "t5", "mt5"])
def test_families_without_such_tokens_say_so_and_name_the_option(family):
    with pytest.raises(UnsupportedError, match=r"names none.*cls_token_id.*token_ids=\(\.\.\.\)"):
        peftlib.attach(backbone(family), "pasta")


def test_a_backbone_that_peftlib_did_not_load_is_told_its_tokens_by_its_config():
    model = backbone("bert")
    del model.config.cls_token_id, model.config.sep_token_id
    with pytest.raises(UnsupportedError, match=r"set model\.config\.cls_token_id"):
        peftlib.attach(model, "pasta")
    model.config.cls_token_id, model.config.sep_token_id = 2, 3
    peftlib.attach(model, "pasta")


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="tokens=0"):
        peftlib.config("pasta", tokens=0)
    with pytest.raises(ConfigError, match="std=-1"):
        peftlib.config("pasta", std=-1)
    with pytest.raises(ConfigError, match="dropout=1"):
        peftlib.config("pasta", dropout=1)
    with pytest.raises(TargetError, match=r"token_ids=\(101, 99999\).*vocabulary, 0 to"):
        peftlib.attach(backbone("bert"), "pasta", token_ids=(101, 99999))
    adapted = peftlib.attach(backbone("bert"), "pasta")
    with pytest.raises(UnsupportedError, match="call it with input_ids"):
        adapted.model(inputs_embeds=torch.zeros(1, 4, 32))
    adapted.detach()
    both = peftlib.attach(adapted.model, peftlib.combine("pasta", "prompt_tuning"))
    with pytest.raises(UnsupportedError, match=r"among 4 tokens, and the layers get 104"):
        both.model(input_ids=torch.tensor([[2, 5, 6, 3]]))


# The published facts

LUKA = "luka-group/PASTA"

FACTS = Facts(
    "pasta",
    Default("dropout", 0.1, f"{LUKA}, PASTA_modeling.py, BertPastaLayer: hidden_dropout_prob of BERT"),
    Default("std", 0.02, f"{LUKA}, PASTA_modeling.py: nn.Embedding under BERT's initializer_range"),
    Default("tokens", 4, "the paper's 0.029 %; the code has as many as a task's rows have, 3 or 2 on BERT"),
    Start("*.pasta.vectors", normal(0.02), f"{LUKA}, PASTA_modeling.py"),
    Trains(("*.pasta.vectors",), f"{LUKA}, main_glue.py: special_token_embedding"),
    Count("bert-large-uncased", 24 * 4 * 1024, "the abstract's 0.029 %", percent="0.029"),
    Count("bert-large-uncased", 24 * 3 * 1024, f"{LUKA}, main_glue.py, task_to_special_tokens: pairs", {"tokens": 3}),
    Count("roberta-base", 12 * 4 * 768, "four special tokens"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
