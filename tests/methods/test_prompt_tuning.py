"""Prompt tuning: where the prompt goes in, what comes out, and what HF peft makes of the same prompt."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

import peftlib
from peftlib import anatomy, backbones
from peftlib.errors import TargetError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Start, Trains, uniform
from tests.methods.helpers import Spy, backbone, inputs, perturb

CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2")


def attached(model, **options):
    adapted = peftlib.attach(model, "prompt_tuning", **({"length": 5} | options))
    return adapted, adapted.host.paths().popitem()[1]


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
        ("qwen2", "causal_lm", "CAUSAL_LM"),
        ("t5", "seq2seq", "SEQ_2_SEQ_LM"),
        ("bart", "seq2seq", "SEQ_2_SEQ_LM"),
    ],
)
def test_the_same_prompt_gives_hf_pefts_logits_loss_and_count(family, head, task):
    torch.manual_seed(0)
    model = backbone(family, head)
    # HF peft keeps a method of the model that transformers 5 no longer has, for its own generate().
    model._prepare_encoder_decoder_kwargs_for_generation = None
    theirs = get_peft_model(
        model, PromptTuningConfig(task_type=task, num_virtual_tokens=5, num_transformer_submodules=1)
    ).eval()
    embedding = theirs.prompt_encoder["default"].embedding.weight
    ours, prompt = attached(backbone(family, head))
    with torch.no_grad():
        prompt.vectors.copy_(embedding)
    batch = inputs(family)
    if head == "classification":
        batch["labels"] = torch.tensor([0, 1, 1])
    else:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected, got = theirs(**batch), ours.model(**batch)
    length = got.logits.shape[1]
    torch.testing.assert_close(got.logits, expected.logits[:, -length:], atol=1e-5, rtol=0)
    if task != "CAUSAL_LM":  # there the prompt's last position predicts the first token too, in HF peft's loss
        torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=0)
    assert (
        ours.count().method
        == embedding.numel()
        == theirs.get_nb_trainable_parameters()[0]
        - (sum(p.numel() for n, p in theirs.named_parameters() if "modules_to_save" in n))
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "opt", "llama", "t5", "bart"])
def test_a_prompt_of_token_embeddings_is_that_text_before_the_input(family):
    head = {"bert": "masked_lm", "roberta": "masked_lm", "t5": "seq2seq", "bart": "seq2seq"}.get(family, "causal_lm")
    batch = inputs(family, 1)
    text = tuple(batch["input_ids"][0, 1:4].tolist())
    longer = {
        "input_ids": torch.cat([torch.tensor([text]), batch["input_ids"]], dim=1),
        "attention_mask": torch.ones(1, 3 + batch["input_ids"].shape[1], dtype=torch.long),
    }
    decoder = {"decoder_input_ids": batch["input_ids"]} if head == "seq2seq" else {}
    expected = logits(backbone(family, head), **longer, **decoder)
    ours, _ = attached(backbone(family, head), length=3, init="text", init_token_ids=text)
    got = logits(ours.model, **batch, **decoder)
    torch.testing.assert_close(got, expected if decoder else expected[:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_and_given_positions_change_nothing(family, side):
    loaded = backbones.load(f"tiny-{family}", head="causal_lm", dropout=0.0)
    tokenizer = loaded.tokenizer
    tokenizer.padding_side = side
    ours, _ = attached(loaded.model)
    batch = dict(tokenizer(["good cast", "a boring film with a weak plot"], padding=True, return_tensors="pt"))
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(ours.model, **batch, position_ids=positions)[0][mask[0].bool()]
    alone = {k: v[:1, mask[0].bool()] for k, v in batch.items()}
    torch.testing.assert_close(together, logits(ours.model, **alone)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "bart"])
def test_generation_with_beams_and_left_padding_does_not_depend_on_the_cache(family):
    head = "seq2seq" if family in ("t5", "bart") else "causal_lm"
    loaded = backbones.load(f"tiny-{family}", head=head, dropout=0.0)
    loaded.tokenizer.padding_side = "left"
    ours, _ = attached(loaded.model)
    perturb(ours)
    texts = ["good cast", "a boring film with a weak plot"]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    first, second = (ours.model.generate(**given, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(first, second)


def test_the_head_pools_the_prompt_in_front_and_cls_with_after_first():
    for position, index in (("front", 0), ("after_first", 5)):
        model = backbone("roberta")
        ours, prompt = attached(model, position=position)
        layer = anatomy.of(model).layers[0].module
        spy = Spy(model.classifier)
        states = []
        layer.register_forward_pre_hook(lambda module, args, states=states: states.append(args[0]))
        logits(ours.model, **inputs("roberta"))
        assert states[0].shape[1] == 5 + inputs("roberta")["input_ids"].shape[1]
        assert spy[model.classifier][0].shape[1] == states[0].shape[1] - index
    plain = logits(backbone("bert"), **inputs("bert"))
    ours, prompt = attached(backbone("bert"), position="after_first")
    spy = Spy(ours.model.bert.embeddings.LayerNorm)
    assert not torch.equal(logits(ours.model, **inputs("bert")), plain)
    embedded = spy[ours.model.bert.embeddings.LayerNorm][0][0]
    table = ours.model.bert.embeddings
    types = table.token_type_embeddings.weight[0]
    assert torch.allclose(embedded[1:6] - table.position_embeddings.weight[1:6] - types, prompt.vectors, atol=1e-6)
    cls = table.word_embeddings.weight[inputs("bert")["input_ids"][0, 0]]
    assert torch.allclose(embedded[0] - table.position_embeddings.weight[0] - types, cls, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("position", ["front", "after_first"])
def test_per_token_heads_answer_for_the_tokens_alone(family, position):
    ours, _ = attached(backbone(family, "masked_lm"), position=position)
    batch = inputs(family)
    assert logits(ours.model, **batch).shape[:2] == batch["input_ids"].shape
    as_tuple = ours.model(**batch, return_dict=False)[0]
    assert torch.equal(as_tuple, logits(ours.model, **batch))


def test_starts_come_from_the_vocabulary_the_text_or_the_range():
    model = backbone("electra")
    table = model.electra.embeddings.word_embeddings.weight.detach().clone()
    _, prompt = attached(model, length=7, common=9)
    rows = [(table == vector).all(dim=1).nonzero().flatten().tolist() for vector in prompt.vectors.detach()]
    assert all(found and found[0] < 9 for found in rows)
    assert len({found[0] for found in rows}) == 7
    _, prompt = attached(backbone("electra"), init="text", init_token_ids=(8, 3))
    assert torch.equal(prompt.vectors, table[[8, 3, 8, 3, 8]])
    _, prompt = attached(backbone("electra"), length=100, init="random", init_range=0.25)
    assert 0.24 < prompt.vectors.abs().max() <= 0.25


def test_too_long_an_input_names_both_lengths_and_the_limit():
    ours, _ = attached(backbone("roberta"), length=20)
    ids = torch.full((1, 250), 9)
    with pytest.raises(UnsupportedError, match=r"250 tokens and 20 trained positions need 270.*has 256.*236 tokens"):
        ours.model(input_ids=ids)
    ours.model(input_ids=ids[:, :236])


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="length=0"):
        peftlib.config("prompt_tuning", length=0)
    with pytest.raises(ConfigError, match="init='txt'"):
        peftlib.config("prompt_tuning", init="txt")
    with pytest.raises(ConfigError, match="needs the token ids"):
        peftlib.config("prompt_tuning", init="text")
    with pytest.raises(TargetError, match="vocabulary has ids 0 to"):
        attached(backbone("bert"), init="text", init_token_ids=(10**6,))
    for family in ("gpt2", "t5"):
        with pytest.raises(UnsupportedError, match='position="front"'):
            attached(backbone(family), position="after_first")
    ours, _ = attached(backbone("llama", "causal_lm"))
    with pytest.raises(UnsupportedError, match="mask of shape"):
        ours.model(input_ids=torch.full((1, 4), 9), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


# The published facts

GOOGLE = "google-research/prompt-tuning"


def check_vocabulary_start():
    model = backbones.load("tiny-bert", dropout=0.0).model
    table = anatomy.of(model).embeddings.weight.detach()
    common = 40
    adapted = peftlib.attach(model, "prompt_tuning", length=20, common=common)
    vectors = adapted.host.trained()["bert.prompt.vectors"]
    rows = [int((table[:common] == vector).all(1).nonzero()) for vector in vectors]
    assert len(set(rows)) == 20


FACTS = Facts(
    "prompt_tuning",
    Default("length", 100, f"{GOOGLE}, configs/models/t5_1_1_prompt.gin, PROMPT_LENGTH"),
    Default("init", "vocabulary", "section 3.2: sampled vocabulary; its class labels need a task's words"),
    Default("common", 5000, "section 3.2: the 5,000 most common tokens"),
    Holds("the prompt starts from different tokens' embeddings", check_vocabulary_start, "section 3.2"),
    Start("*.prompt.vectors", uniform(0.5), f"{GOOGLE}, t5_1_1_prompt.gin, scale = 0.5", {"init": "random"}),
    Trains(("bert.prompt.vectors",), "section 2"),
    Trains(("*encoder.prompt.vectors",), "section 2: in front of the encoder's input", family="t5"),
    Count("t5-base", 100 * 768, "section 2: m e numbers"),
    Count("roberta-base", 100 * 768, "section 2"),
    Count("llama-7b", 100 * 4096, "section 2"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
