"""What every task can do: draws, batches, metrics, mixtures, and the errors on the way."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from peftlib import backbones, tasks
from peftlib.backbones import tiny
from peftlib.errors import DataError, SourceError, UnknownNameError, UnsupportedError
from peftlib.tasks import smoke
from peftlib.tasks.text import normalized


@pytest.fixture(scope="module")
def bert():
    return tiny.tokenizer("bert")


def _rows(n, classes=2):
    return [{"text": f"row number {i}", "label": i % classes} for i in range(n)]


# Generated tasks


@pytest.mark.parametrize("name", smoke.NAMES)
def test_smoke_tasks_are_small_disjoint_and_in_the_tiny_vocabulary(name, bert):
    task = tasks.load(name)
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 48, "validation": 16, "test": 16}
    rows = [tuple(row[c] for c in task.text_columns) for split in task.splits.values() for row in split]
    assert len(set(rows)) == 80
    words = {word for row in rows for text in row for word in text.split()}
    assert words <= set(tiny.WORDS)
    assert not any(token.startswith("##") for word in words for token in bert.tokenize(word))
    if task.kind == "classification":
        assert all(np.mean(split["label"]) == 0.5 for split in task.splits.values())
        assert task.num_labels == 2
    assert task.fingerprint == tasks.load(name).fingerprint


@pytest.mark.parametrize("name", ["smoke", "smoke-pair"])
def test_smoke_tasks_can_be_learned(name):
    torch.manual_seed(0)
    task, backbone = tasks.load(name), backbones.load("tiny-bert", dropout=0.0)
    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=3e-3)
    for _ in range(30):
        for batch in task.loader("train", backbone.tokenizer, 16, shuffle=True):
            backbone.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    batch = next(iter(task.loader("test", backbone.tokenizer, 16)))
    with torch.no_grad():
        scores = task.evaluate(backbone.model(**batch).logits, batch["labels"])
    assert scores["accuracy"] >= 0.9


# Draws


def test_few_shot_is_balanced_disjoint_and_seeded():
    task = tasks.custom("rows", {"train": _rows(90, 3), "test": _rows(30, 3)})
    assert task.num_labels == 3
    few = task.few_shot(20, n_validation=10, n_test=7, seed=1)
    counts = np.bincount(few.splits["train"]["label"])
    assert sorted(counts) == [6, 7, 7]
    assert not set(few.splits["train"]["text"]) & set(few.splits["validation"]["text"])
    assert {split: len(rows) for split, rows in few.splits.items()} == {"train": 20, "test": 7, "validation": 10}
    assert (
        few.fingerprint == task.few_shot(20, 10, 7, seed=1).fingerprint != task.few_shot(20, 10, 7, seed=2).fingerprint
    )


def test_few_shot_larger_than_the_data_is_an_error():
    task = tasks.load("smoke")
    with pytest.raises(DataError, match=r"n_train=100 balanced rows.*48 training rows of 'smoke'"):
        task.few_shot(100)
    with pytest.raises(DataError, match="n_validation=30"):
        task.few_shot(40, 30)
    with pytest.raises(DataError, match="n_train=100 rows"):
        tasks.load("smoke-regression").few_shot(100)


def test_limit_and_few_shot_by_name():
    assert {s: len(r) for s, r in tasks.load("smoke", limit=5).splits.items()} == {
        "train": 5,
        "validation": 5,
        "test": 5,
    }
    limited = tasks.load("smoke", limit={"test": 3})
    assert (len(limited.splits["train"]), len(limited.splits["test"])) == (48, 3)
    few = tasks.load("smoke-fewshot", n_train=16, n_validation=8, seed=5)
    assert (len(few.splits["train"]), len(few.splits["validation"])) == (16, 8)
    with pytest.raises(UnknownNameError, match="split of task 'smoke' 'dev'"):
        tasks.load("smoke", limit={"dev": 3})


# Batches


def test_batches_are_padded_to_their_longest_row(bert):
    rows = [{"text": "good", "label": 1}, {"text": "a very long and very bad movie", "label": 0}]
    task = tasks.custom("two", {"train": rows, "test": rows, "validation": rows})
    batch = next(iter(task.loader("train", bert, 2)))
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, 9)
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64
    assert [b["input_ids"].shape[1] for b in task.loader("train", bert, 1)] == [3, 9]


def test_pairs_carry_token_types_and_are_cut_to_max_length(bert):
    task = tasks.load("smoke-pair")
    assert task.text_columns == ("text", "text_pair")
    batch = next(iter(task.loader("test", bert, 4)))
    assert batch["token_type_ids"].max() == 1
    assert next(iter(task.loader("test", bert, 4, max_length=6)))["input_ids"].shape[1] == 6


def test_pair_for_a_tokenizer_without_separator_shows_where_the_second_text_begins():
    tokenizer = tiny.tokenizer("gpt2")
    seen = []

    class Spy:
        model_max_length = tokenizer.model_max_length

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def __call__(self, texts, *more, **options):
            seen.append((texts, more))
            return tokenizer(texts, *more, **options)

    tasks.load("smoke-pair").encode(Spy(), "test")
    texts, more = seen[0]
    assert more == ()
    assert all(text.count("\n") == 1 for text in texts)


def test_shuffling_follows_the_seed(bert):
    task = tasks.load("smoke")

    def order(**options):
        return [tuple(b["input_ids"][0].tolist()) for b in task.loader("train", bert, 1, **options)]

    assert order() == order()
    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1)
    assert order(shuffle=True, seed=1) != order(shuffle=True, seed=2)
    assert sorted(order(shuffle=True, seed=1)) == sorted(order())
    loader = task.loader("train", bert, 1, shuffle=True, seed=1)
    epochs = [[tuple(b["input_ids"][0].tolist()) for b in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_batches_of_similar_length_hold_every_row_once_with_less_padding(bert):
    rows = [{"text": " ".join(["movie"] * (1 + 7 * i % 23)), "label": i} for i in range(300)]
    task = tasks.Task("made", "regression", {"train": Dataset.from_list(rows)}, "custom", ("mse",))

    def batches(**options):
        return list(task.loader("train", bert, 8, seed=1, **options))

    grouped, plain = batches(shuffle=True, group_by_length=True), batches(shuffle=True)
    assert sorted(float(x) for b in grouped for x in b["labels"]) == list(range(300))
    assert [len(b["labels"]) for b in grouped] == [8] * 37 + [4]
    padded = [sum(b["input_ids"].numel() for b in batch) for batch in (grouped, plain)]
    assert padded[0] < 0.7 * padded[1]
    widths = [b["input_ids"].shape[1] for b in grouped]
    assert widths != sorted(widths) != sorted(widths, reverse=True)
    loader = task.loader("train", bert, 8, seed=1, shuffle=True, group_by_length=True)
    first, second = ([tuple(b["labels"].tolist()) for b in loader] for _ in range(2))
    assert {frozenset(b) for b in first} != {frozenset(b) for b in second}
    longest_first = [b["input_ids"].shape[1] for b in batches(group_by_length=True)]
    assert longest_first == sorted(longest_first, reverse=True)


def test_loading_batches_leaves_the_global_random_state(bert):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(tasks.load("smoke").loader("train", bert, 8, shuffle=True, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_causal_rows_mask_the_prompt_and_keep_room_for_the_answer():
    tokenizer = tiny.tokenizer("llama")
    rows = [{"text": "the movie was", "label": "very good"}, {"text": "good " * 50, "label": "bad " * 3}]
    task = tasks.custom("lm", {"train": rows, "validation": rows}, kind="causal_lm")
    short, long = task.encode(tokenizer, "train", 16)
    asked = [i for i, label in zip(short["input_ids"], short["labels"]) if label != -100]
    assert tokenizer.convert_ids_to_tokens(asked) == ["very", "good", "</s>"]
    assert short["input_ids"][0] == tokenizer.bos_token_id
    assert len(long["input_ids"]) == len(long["labels"]) == 16
    assert tokenizer.decode([label for label in long["labels"] if label != -100]).startswith("bad bad bad")
    batch = next(iter(task.loader("train", tokenizer, 2)))
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["labels"] != -100, (batch["labels"] != -100) & batch["attention_mask"].bool())
    tokenizer.padding_side = "left"
    batch = next(iter(task.loader("train", tokenizer, 2)))
    assert batch["labels"][0, -1] == batch["input_ids"][0, -1] == tokenizer.eos_token_id


def test_every_family_trains_on_the_task_of_its_kind():
    for family, head, name in (
        ("t5", "seq2seq", "smoke-seq2seq"),
        ("bart", "seq2seq", "smoke-seq2seq"),
        ("llama", "causal_lm", "smoke-lm"),
        ("gpt2", "causal_lm", "smoke-lm"),
        ("bart", "classification", "smoke-pair"),
        ("t5", "classification", "smoke"),
    ):
        task, backbone = tasks.load(name), backbones.load(f"tiny-{family}", head=head)
        batch = next(iter(task.loader("train", backbone.tokenizer, 8)))
        output = backbone.model(**batch)
        assert torch.isfinite(output.loss)
        scores = task.evaluate(output.logits, batch["labels"])
        assert scores["nll"] == pytest.approx(output.loss.item(), rel=1e-4)


def test_regression_labels_are_floats():
    task, backbone = tasks.load("smoke-regression"), backbones.load("tiny-bert", num_labels=1)
    assert task.num_labels == 1
    batch = next(iter(task.loader("train", backbone.tokenizer, 8)))
    assert batch["labels"].dtype == torch.float32
    output = backbone.model(**batch)
    assert task.evaluate(output.logits, batch["labels"])["mse"] == pytest.approx(output.loss.item(), rel=1e-5)


# Metrics


def test_classification_metrics_by_hand():
    task = tasks.custom("t", {"train": _rows(4)}, metrics=("matthews", "accuracy", "f1", "nll", "ece"))
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]))
    labels = torch.tensor([0, 1, 1, 0])
    scores = task.evaluate(logits, labels)
    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx(2 / 3)
    # tp=1 tn=2 fp=0 fn=1: (1*2 - 0*1) / sqrt(1*2*2*3)
    assert scores["matthews"] == pytest.approx(2 / np.sqrt(12))
    assert scores["nll"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.7]).mean(), abs=1e-6)
    assert scores["ece"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4, abs=1e-6)
    assert all(type(value) is float for value in scores.values())
    assert set(task.evaluate(logits.argmax(1), labels)) == {"matthews", "accuracy", "f1"}


def test_ece_against_a_literal_formula():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], size=500)
    labels = rng.integers(0, 3, 500)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    task = tasks.custom("t", {"train": _rows(6, 3)})
    assert task.evaluate(np.log(probabilities), labels)["ece"] == pytest.approx(expected)


def test_regression_metrics_and_constant_predictions():
    task = tasks.load("smoke-regression")
    scores = task.evaluate(np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.0, 3.0]))
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 9], [1, 2, 3])[0, 1])
    assert scores["mse"] == pytest.approx(12.0)
    assert task.evaluate(np.ones(3), np.array([1.0, 2.0, 3.0]))["pearson"] == 0.0


def test_main_metric_and_its_direction():
    assert (tasks.load("smoke").main_metric, tasks.load("smoke").greater_is_better) == ("accuracy", True)
    assert (tasks.load("smoke-lm").main_metric, tasks.load("smoke-lm").greater_is_better) == ("nll", False)


def test_outputs_and_labels_of_different_length():
    with pytest.raises(DataError, match="3 outputs for 2 labels"):
        tasks.load("smoke").evaluate(np.zeros((3, 2)), np.zeros(2, dtype=int))


def test_generated_text_is_scored_by_sacrebleu_or_says_so():
    task = tasks.load("smoke-seq2seq")
    texts = ["the movie was very good indeed", "this plot was boring and long"]
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        with pytest.raises(UnsupportedError, match="pip install sacrebleu"):
            task.evaluate(texts, texts)
    else:
        scores = task.evaluate(texts, texts)
        assert scores == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
        assert task.evaluate(texts[::-1], texts)["bleu"] < 20


# Mixtures


def test_mixture_carries_task_ids_and_all_rows():
    one, pair = tasks.load("smoke"), tasks.load("smoke-pair")
    mixed = tasks.mix([one, pair])
    assert mixed.members == ("smoke", "smoke-pair")
    assert len(mixed.splits["train"]) == 96
    assert np.bincount(mixed.splits["train"]["task_id"]).tolist() == [48, 48]
    assert len(mixed.splits["test"]) == 32
    for tokenizer in (tiny.tokenizer("bert"), tiny.tokenizer("roberta"), tiny.tokenizer("gpt2")):
        batch = next(iter(mixed.loader("train", tokenizer, 16, shuffle=True)))
        assert set(batch["task_ids"].tolist()) == {0, 1}
    rows = {tuple(r["input_ids"]) for r in mixed.encode(tiny.tokenizer("bert"), "test")}
    alone = [tuple(r["input_ids"]) for t in (one, pair) for r in t.encode(tiny.tokenizer("bert"), "test")]
    assert rows == set(alone)


def test_temperature_evens_out_the_shares():
    large = tasks.custom("large", {"train": _rows(900), "validation": _rows(4)})
    small = tasks.custom("small", {"train": _rows(100), "validation": _rows(4)})
    shares = {
        t: np.bincount(tasks.mix([large, small], temperature=t).splits["train"]["task_id"]).tolist()
        for t in (1, 2, 1e9)
    }
    assert shares == {1: [900, 100], 2: [750, 250], 1e9: [500, 500]}


def test_mixture_scores_each_member():
    mixed = tasks.mix([tasks.load("smoke"), tasks.load("smoke-pair")])
    logits, labels = np.eye(2)[[0, 1, 1, 1]], np.array([0, 1, 0, 1])
    scores = mixed.evaluate(logits, labels, task_ids=np.array([0, 0, 1, 1]))
    assert (scores["smoke/accuracy"], scores["smoke-pair/accuracy"], scores["mean"]) == (1.0, 0.5, 0.75)
    assert scores["accuracy"] == 0.75
    assert "mean" not in mixed.evaluate(logits, labels)


def test_what_does_not_mix():
    with pytest.raises(DataError, match="smoke-regression is regression"):
        tasks.mix([tasks.load("smoke"), tasks.load("smoke-regression")])
    with pytest.raises(DataError, match="twice"):
        tasks.mix([tasks.load("smoke"), tasks.load("smoke")])
    with pytest.raises(DataError, match="temperature=0"):
        tasks.mix([tasks.load("smoke")], temperature=0)
    with pytest.raises(DataError, match="at least one"):
        tasks.mix([])


# Own data


def test_own_rows_with_own_columns(bert):
    rows = [{"q": f"what is {i}", "a": f"it is {i}", "y": i % 2} for i in range(100)]
    task = tasks.custom(
        "mine", {"train": rows, "test": Dataset.from_list(rows[:5])}, text="q", text_pair="a", label="y"
    )
    assert task.text_columns == ("text", "text_pair")
    assert task.label_names == ("0", "1")
    assert len(task.splits["train"]) + len(task.splits["validation"]) == 100
    keys = {s: {normalized(t) for t in task.splits[s]["text"]} for s in ("train", "validation")}
    assert not keys["train"] & keys["validation"]
    assert next(iter(task.loader("train", bert, 4)))["labels"].shape == (4,)


def test_task_without_labels_can_be_predicted_but_not_trained(bert):
    rows = [{"text": "good movie"}, {"text": "bad movie"}]
    task = tasks.custom("plain", {"train": rows, "validation": rows}, label=None)
    assert set(next(iter(task.loader("validation", bert, 2)))) == {"input_ids", "token_type_ids", "attention_mask"}
    with pytest.raises(DataError, match=r"'plain' has no column 'label' in split 'train'.*text"):
        task.loader("train", bert, 2)
    with pytest.raises(DataError, match="'label'"):
        task.few_shot(2)


def test_errors_of_own_data():
    with pytest.raises(DataError, match=r"no column 'label' in split 'train'; it has: text\. Name yours with label="):
        tasks.custom("x", {"train": [{"text": "a"}]})
    with pytest.raises(DataError, match=r"no column 'text'.*sentence.*text="):
        tasks.custom("x", {"train": [{"sentence": "a", "label": 0}]})
    with pytest.raises(DataError, match="split 'train' is empty"):
        tasks.custom("x", {"train": []})
    with pytest.raises(DataError, match="class numbers from 0"):
        tasks.custom("x", {"train": [{"text": "a", "label": "yes"}]})
    with pytest.raises(UnknownNameError, match="kind of task 'classify'"):
        tasks.custom("x", {"train": _rows(4)}, kind="classify")


def test_errors_of_names_and_sources(bert):
    with pytest.raises(UnknownNameError, match="did you mean 'sentences'"):
        tasks.load("sentence")
    with pytest.raises(UnknownNameError, match="embedded, generated, folder, hub"):
        tasks.load("smoke", source="web")
    with pytest.raises(SourceError, match="'smoke' is generated"):
        tasks.load("smoke", source="hub")
    with pytest.raises(SourceError, match="is not embedded"):
        tasks.load("glue/cola", source="embedded")
    with pytest.raises(UnknownNameError, match="option of task 'smoke' 'shots'"):
        tasks.load("smoke", shots=3)
    with pytest.raises(UnknownNameError, match="'dev'"):
        tasks.load("smoke").loader("dev", bert, 2)
