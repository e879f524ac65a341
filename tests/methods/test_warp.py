"""WARP: the text with its prompts and [MASK], what scores the mask on both kinds of head, no dropout, WARP_0."""

import pytest
import torch
from torch import nn

import peftlib
from peftlib import anatomy, backbones, tasks
from peftlib.conformance.case import batch, train
from peftlib.errors import TargetError, UnknownNameError, UnsupportedError
from peftlib.methods.base import ConfigError
from tests.methods.facts import Count, Default, Facts, Holds, Trains
from tests.methods.helpers import backbone, inputs, perturb

ENCODERS = ("bert", "roberta", "electra", "distilbert")
WORDS = ("great", "film", "so", "it", "was")
CLASSES = ("bad", "good")


def ids(family, words):
    return tuple(backbones.load(f"tiny-{family}").tokenizer.convert_tokens_to_ids(word) for word in words)


def encoded(family, *texts):
    return dict(backbones.load(f"tiny-{family}").tokenizer(*texts, padding=True, return_tensors="pt"))


def by_hand(family, pairs):
    """The texts with a template of (2, 1, 1, 1) written out."""
    mask = backbones.load(f"tiny-{family}").tokenizer.mask_token
    one, two, three, four, five = WORDS
    if pairs:
        return encoded(
            family,
            [f"{one} {two} good cast {three} {mask} {four}", f"{one} {two} a weak plot {three} {mask} {four}"],
            [f"fine {five}", f"the dull one {five}"],
        )
    return encoded(
        family, [f"{one} {two} {text} {three} {mask} {four} {five}" for text in ("good cast", "a weak plot")]
    )


def plain(family, pairs):
    first = ["good cast", "a weak plot"]
    return encoded(family, first, ["fine", "the dull one"]) if pairs else encoded(family, first)


def attached(model, family, **options):
    options = {"template": (2, 1, 1, 1), "init": "tokens", "init_token_ids": ids(family, WORDS)} | options
    return peftlib.attach(model, "warp", **options)


def at_mask(family, data, values):
    return values[data["input_ids"] == backbones.load(f"tiny-{family}").tokenizer.mask_token_id]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pair"])
@torch.no_grad()
def test_words_as_prompts_and_classes_give_the_masked_language_models_own_logits(family, pairs):
    model = backbone(family, "masked_lm")
    data, classes = by_hand(family, pairs), ids(family, CLASSES)
    expected = at_mask(family, data, model(**data).logits)[:, classes] - model.get_output_embeddings().bias[[*classes]]
    adapted = attached(model, family, verbalizer_token_ids=classes)
    given = plain(family, pairs)
    torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=0)
    labels = torch.tensor([1, 0])
    answer = model(**given, labels=labels)
    torch.testing.assert_close(answer.loss, nn.functional.cross_entropy(expected, labels), atol=1e-5, rtol=0)
    assert torch.equal(answer["loss"], answer.loss)
    as_tuple = model(**given, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], answer.loss)
    assert torch.equal(as_tuple[1], answer.logits)
    assert torch.equal(model(**given, return_dict=False)[0], answer.logits)
    adapted.detach()
    assert model(**given).logits.shape[-1] > 2


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_on_a_classification_model_the_masks_state_itself_is_scored_by_the_last_linear_map(family):
    model = backbone(family)
    data = by_hand(family, True)
    state = at_mask(family, data, model.base_model(**data).last_hidden_state)
    adapted = attached(model, family)
    weight, bias = (adapted.trainable()[name] for name in adapted.head_names)
    expected = state @ weight.T + bias
    torch.testing.assert_close(model(**plain(family, True)).logits, expected, atol=1e-5, rtol=0)
    assert weight.shape == (2, 32)
    assert adapted.count().head == 2 * 33


@pytest.mark.parametrize("head", ["classification", "masked_lm"])
def test_warp_0_has_a_mask_and_class_vectors_alone(head, tmp_path):
    model = backbone("roberta", head)
    adapted = attached(model, "roberta", template=(0, 0, 0, 0), init="mask", init_token_ids=())
    assert set(adapted.trainable()) == set(adapted.head_names)
    assert adapted.count().method == 0
    tokenizer = backbones.load("tiny-roberta").tokenizer
    written = encoded("roberta", [f"good cast {tokenizer.mask_token}"])
    states = []
    layer = adapted.host.anatomy.layers[-1].module
    layer.register_forward_hook(lambda module, args, output: states.append(args[0]))
    with torch.no_grad():
        before = model(**encoded("roberta", ["good cast"])).logits
        loaded = peftlib.load(backbone("roberta", head), adapted.save(tmp_path / "a"))
    assert states[0].shape[1] == written["input_ids"].shape[1]
    with torch.no_grad():
        assert torch.equal(loaded.model(**encoded("roberta", ["good cast"])).logits, before)


def test_prompts_start_as_the_mask_as_the_matrix_or_as_tokens():
    table = backbone("bert").bert.embeddings.word_embeddings.weight.detach()
    mask = ids("bert", ["[MASK]"])[0]

    def start(**options):
        return peftlib.attach(backbone("bert"), "warp", **options).host.paths()["bert.prompt"].vectors.detach()

    assert torch.equal(start(), table[mask].expand(20, -1))
    normal = start(init="normal", template=(200, 0, 0, 0))
    assert abs(normal.std() / table.std() - 1) < 0.05
    assert abs(normal.mean() - table.mean()) < 0.01
    assert torch.equal(start(init="tokens", init_token_ids=(0,)), table[0].expand(20, -1))


def test_the_backbone_trains_without_dropout_and_has_it_back_afterwards():
    model = backbones.load("tiny-bert", dropout=0.5).model
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert max(rates) == 0.5
    adapted = peftlib.attach(model, "warp")
    model.train()
    first, second = (model(**inputs("bert")).logits for _ in range(2))
    assert torch.equal(first, second)
    adapted.detach()
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == rates


def test_class_vectors_from_words_are_taken_back_by_detach():
    model = backbone("bert")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = attached(model, "bert", verbalizer_token_ids=ids("bert", CLASSES))
    table = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.classifier.weight, table[[*ids("bert", CLASSES)]])
    assert not model.classifier.bias.any()
    train(adapted, batch("bert"), steps=2)
    adapted.detach()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_fit_trains_a_masked_language_model_for_a_task_and_its_file_holds_prompts_and_classes(tmp_path):
    loaded = backbones.load("tiny-bert", head="masked_lm", num_labels=2)
    adapted = peftlib.attach(loaded.model, "warp")
    task = tasks.load("smoke")
    result = peftlib.fit(adapted, task, tokenizer=loaded.tokenizer, steps=4, progress=False)
    assert 0 <= result.metrics[task.main_metric] <= 1
    assert set(adapted.state()) == {
        "bert.prompt.vectors",
        "cls.predictions.decoder.warp.weight",
        "cls.predictions.decoder.warp.bias",
    }
    again = peftlib.load(backbone("bert", "masked_lm"), adapted.save(tmp_path / "a"))
    data = inputs("bert")
    assert torch.equal(again.model.eval()(**data).logits, loaded.model.eval()(**data).logits)


def test_a_masked_language_model_with_one_class_regresses():
    model = backbone("bert", "masked_lm")
    model.config.num_labels = 1
    peftlib.attach(model, "warp")
    labels = torch.tensor([0.5, 1.0, -1.0])
    answer = model(**inputs("bert"), labels=labels)
    torch.testing.assert_close(answer.loss, ((answer.logits[:, 0] - labels) ** 2).mean())


@pytest.mark.parametrize("head", ["classification", "masked_lm"])
def test_without_the_head_only_prompts_train(head):
    adapted = peftlib.attach(backbone("bert", head), "warp", train_head=False)
    assert set(adapted.trainable()) == {"bert.prompt.vectors"}
    train(adapted, batch("bert"), steps=1)


@pytest.mark.parametrize("head", ["classification", "masked_lm"])
def test_it_combines_with_another_method(head):
    model = backbone("bert", head)
    adapted = peftlib.attach(model, peftlib.combine("warp", "bitfit"))
    perturb(adapted, std=0.1)
    assert adapted.count().head == 66
    assert train(adapted, batch("bert"), steps=1)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"template=\(5, 5\) needs four numbers"):
        peftlib.config("warp", template=(5, 5))
    with pytest.raises(ConfigError, match="template=-1"):
        peftlib.config("warp", template=(-1, 0, 0, 0))
    with pytest.raises(UnknownNameError, match="'mask'"):
        peftlib.config("warp", init="msk")
    with pytest.raises(ConfigError, match="needs token ids"):
        peftlib.config("warp", init="tokens")
    with pytest.raises(TargetError, match=r"99999\) are not all in the vocabulary, 0 to"):
        peftlib.attach(backbone("bert"), "warp", init="tokens", init_token_ids=(99999,))
    with pytest.raises(TargetError, match="give 3 vectors of width 32; the model has 2 classes of width 32"):
        peftlib.attach(backbone("bert"), "warp", verbalizer_token_ids=(5, 6, 7))
    for family, head in (("gpt2", "classification"), ("t5", "seq2seq"), ("bart", "classification")):
        with pytest.raises(UnsupportedError, match=r"takes an encoder.*prompt_tuning or p_tuning"):
            peftlib.attach(backbone(family, head), "warp")
    with pytest.raises(UnsupportedError, match="BertForTokenClassification is neither"):
        peftlib.attach(backbones.load("tiny-bert", head="token_classification").model, "warp")
    model = backbone("bert")
    del model.config.mask_token_id
    with pytest.raises(UnsupportedError, match=r"set model\.config\.mask_token_id and sep_token_id"):
        peftlib.attach(model, "warp")


@pytest.mark.parametrize("family", ENCODERS)
def test_the_scorer_is_the_heads_last_linear_map(family):
    model = backbone(family)
    seen = []
    handle = anatomy.of(model).scorer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(**inputs(family)).logits is seen[0]
    handle.remove()


# The published facts

YEREVANN = "YerevaNN/WARP"


def check_start():
    model = backbone("bert", "masked_lm")
    mask = anatomy.of(model).embeddings.weight.detach()[model.config.mask_token_id]
    vectors = peftlib.attach(model, "warp").host.trained()["bert.prompt.vectors"]
    assert all(torch.equal(vector, mask) for vector in vectors)


def check_no_dropout():
    model = backbones.load("tiny-bert", head="masked_lm").model
    peftlib.attach(model, "warp")
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))


FACTS = Facts(
    "warp",
    Default("template", (5, 5, 5, 5), "section 4: 20 prompts in groups"),
    Default("init", "mask", f"{YEREVANN}, arp/injector.py: prompt_better_init"),
    Holds("the vectors start as the mask's embedding", check_start, "section 3.2"),
    Holds("there is no dropout", check_no_dropout, f"{YEREVANN}, configs/warp.jsonnet: eval_mode"),
    Trains(("bert.prompt.vectors",), "section 3.2: only_prompts; the class vectors are the head"),
    # With three class vectors of MNLI 23,555, the abstract's "up to 25K".
    Count("roberta-large", 20 * 1024, "section 4"),
    Count("roberta-base", 20 * 768, "section 4"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
