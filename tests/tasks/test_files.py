"""Benchmark files as they are released, with their traps, in a folder made here; and the real ones where there are any.

``PEFTLIB_DATA`` names the folder with the real files; without it the tests of row counts are skipped.
"""

import csv
import gzip
import io
import json
import os

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from peftlib import sources, tasks
from peftlib.backbones import tiny
from peftlib.errors import DataError, SourceError
from peftlib.tasks import files, glue

REAL = os.environ.get("PEFTLIB_DATA")
real = pytest.mark.skipif(not REAL, reason="PEFTLIB_DATA does not name a folder with the benchmark files")


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8", newline="")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in the released layout: few rows, every trap."""
    monkeypatch.delenv("PEFTLIB_DATA", raising=False)
    place = tmp_path / "glue"
    cola = [f"gj04\t{i % 2}\t{'*' if i % 2 == 0 else ''}\tSentence number {i} is here." for i in range(50)]
    cola[3] = 'clc95\t1\t\tHe said "so and left.'
    cola[4] = "clc95\t0\t*\tA line end\u2028and a tab-less\x85one inside."
    cola[5] = "clc95\t1\t\tNone"
    _write(place / "CoLA" / "train.tsv", "\n".join(cola) + "\n")
    _write(place / "CoLA" / "dev.tsv", "\n".join(cola[:6]))
    pairs = [f'{i % 2}\t{i}\t{i + 1}\tFirst "text {i}\tSecond text {i}' for i in range(40)]
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    _write(place / "MRPC" / "train.tsv.gz", "\n".join([header, *pairs]) + "\n")
    _write(place / "MRPC" / "dev.tsv", "\n".join([header, *pairs[:4]]) + "\n")
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    scores = [f"{i}\tg\tf\ty\t{i}\ts\ts\tOne {i}\tTwo {i}\t{i / 8:.3f}" for i in range(40)]
    _write(place / "STS-B" / "train.tsv.gz", "\n".join([header, *scores]) + "\n")
    _write(place / "STS-B" / "dev.tsv", "\n".join([header, *scores[:5]]) + "\n")
    entailed = [f"{i}\tPremise {i}\tHypothesis {i}\t{('entailment', 'not_entailment')[i % 2]}" for i in range(40)]
    for part, rows in (("train.tsv.gz", entailed), ("dev.tsv", entailed[:3])):
        _write(place / "RTE" / part, "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    questions = [f"{i}\t1\t2\tWhat is {i}?\tWho is {i}?\t{i % 2}" for i in range(40)]
    for part, rows in (("train.tsv", [*questions, "99\tbroken"]), ("dev.tsv", questions[:3])):
        _write(place / "QQP" / part, "\n".join(["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", *rows]) + "\n")
    names = ("entailment", "neutral", "contradiction")
    inferred = [f"{i}\tP {i}\tH {i}\tx\t{names[i % 3]}" for i in range(40)]
    for part, rows in (
        ("train.tsv", inferred),
        ("dev_matched.tsv", inferred[:6]),
        ("dev_mismatched.tsv", inferred[:3]),
    ):
        _write(place / "MNLI" / part, "\n".join(["index\tsentence1\tsentence2\tlabel1\tgold_label", *rows]) + "\n")
    return tmp_path


def _all(task):
    return [row for split in ("train", "validation") for row in task.splits[split]]


def test_cola_is_not_quoted_and_lines_end_at_line_feeds_alone(root):
    task = tasks.load("glue/cola", root=root)
    assert (task.source, task.kind, task.num_labels, task.main_metric) == ("folder", "classification", 2, "matthews")
    assert len(_all(task)) == 50
    assert [row["text"] for row in task.splits["test"]][3:] == [
        'He said "so and left.',
        "A line end\u2028and a tab-less\x85one inside.",
        "None",
    ]
    assert task.splits["test"]["label"][:4] == [0, 1, 0, 1]


def test_gzipped_pairs(root):
    task = tasks.load("glue/mrpc", root=root)
    assert len(_all(task)) == 40
    assert task.splits["test"][1] == {"text": 'First "text 1', "text_pair": "Second text 1", "label": 1}
    assert task.text_columns == ("text", "text_pair")


def test_scores_and_named_labels(root):
    task = tasks.load("glue/stsb", root=root)
    assert (task.kind, task.num_labels, task.main_metric) == ("regression", 1, "pearson")
    assert task.splits["test"]["label"][:] == [0.0, 0.125, 0.25, 0.375, 0.5]
    task = tasks.load("glue/rte", root=root)
    assert task.label_names == ("entailment", "not_entailment")
    assert task.splits["test"]["label"][:] == [0, 1, 0]
    task = tasks.load("glue/mnli", root=root)
    assert task.splits["test_mismatched"]["label"][:] == [0, 1, 2]
    assert len(tasks.load("glue/qqp", root=root).splits["test"]) == 3


def test_validation_is_cut_from_train_by_text(root):
    task = tasks.load("glue/cola", root=root)
    texts = {split: set(task.splits[split]["text"]) for split in ("train", "validation")}
    assert not texts["train"] & texts["validation"]
    rows = [{"text": f"A  Sentence, {i % 500}!" if i % 2 else f"a sentence {i % 500}", "label": 0} for i in range(2000)]
    train, validation = glue.cut(rows)
    assert 100 < len(validation) < 320
    numbers = [{row["text"].strip("!").split()[-1] for row in part} for part in (train, validation)]
    assert not numbers[0] & numbers[1]
    _, validation = glue.cut([{"text": f"text {i}", "label": 0} for i in range(40_000)])
    assert 1800 < len(validation) < 2200


def test_environment_names_the_folder(root, monkeypatch):
    monkeypatch.setenv("PEFTLIB_DATA", str(root))
    assert tasks.load("glue/cola").source == "folder"
    assert tasks.load("glue/cola-fewshot", n_train=8, n_validation=8, seed=1).splits["train"]["label"][:].count(1) == 4


def test_damaged_files_are_named(root):
    path = root / "glue" / "CoLA" / "train.tsv"
    good = path.read_text(encoding="utf-8")
    path.write_text(good + "gj04\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"CoLA/train.tsv, line 51: 2 cells where 4 are due"):
        tasks.load("glue/cola", root=root)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        tasks.load("glue/cola", root=root)
    packed = root / "glue" / "MRPC" / "train.tsv.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.tsv\.gz is damaged"):
        tasks.load("glue/mrpc", root=root)
    (root / "glue" / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(DataError, match="label 'maybe' is none of entailment, not_entailment"):
        tasks.load("glue/rte", root=root)
    (root / "glue" / "STS-B" / "dev.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    with pytest.raises(DataError, match="no column 'score'; it has: index, sentence1, sentence2"):
        tasks.load("glue/stsb", root=root)


def test_folder_without_the_task(root):
    with pytest.raises(SourceError, match=r"is not in a folder.*PEFTLIB_DATA"):
        tasks.load("glue/qnli", root=root, source="folder")


def test_no_network_names_the_ways_out(root, monkeypatch):
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(SourceError) as error:
        tasks.load("glue/qnli", root=root)
    for part in ("'glue/qnli'", "not reachable", "PEFTLIB_DATA", "root=", "sentences", "smoke"):
        assert part in str(error.value)
    assert before == datasets.config.HF_HUB_OFFLINE


def test_hub_rows_equal_folder_rows(root, monkeypatch):
    """The hub's layout (numbered labels, other column names) gives the same task as the released files."""
    asked = []

    def load_dataset(*name):
        asked.append(name)
        rows = [{"premise": f"P {i}", "hypothesis": f"H {i}", "label": i % 3, "idx": i} for i in range(40)]
        parts = {"train": rows, "validation_matched": rows[:6], "validation_mismatched": rows[:3]}
        return DatasetDict({part: Dataset.from_list(found) for part, found in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    hub = tasks.load("glue/mnli", source="hub", root=root)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert hub.source == "hub"
    assert hub.fingerprint == tasks.load("glue/mnli", root=root).fingerprint


# Translation, instructions, questions


def _generation(root):
    news = root / "mt" / "wmt16-enro"
    for part in ("newsdev2016", "newstest2016"):
        _write(news / f"{part}.en", "One house.\nTwo \u2028 houses.\n")
        _write(news / f"{part}.ro", "O casă.\nDouă case și țară.\n")
    _write(root / "mt" / "ro-sts" / "RO-STS.train.en.gz", "A dog.\nA dog.\nA cat.\n")
    _write(root / "mt" / "ro-sts" / "RO-STS.train.ro.gz", "Un câine.\nUn câine.\nO pisică.\n")
    _write(root / "mt" / "tatoeba" / "ron-eng.tsv.gz", 'He said "hi.\tEl şi ţara.\tCC-BY\n')
    answers = [
        {"instruction": f"Do {i}.", "input": "" if i % 2 else f"x {i}", "output": f"Done {i}."} for i in range(80)
    ]
    answers[7]["output"] = ""
    path = root / "instruct" / "alpaca_random_9229.jsonl.gz"
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    subjects = {"abstract_algebra": "test.csv", "professional_law": "test.csv.gz"}
    for subject, ending in subjects.items():
        for part, rows, name in (("dev", 5, "dev.csv"), ("test", 3, ending)):
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            for i in range(rows):
                writer.writerow([f'{subject}, "{part}"\nline\r\ntwo {i}', "None", "", "3,4", "d", "ABCD"[i % 4]])
            _write(root / "mmlu" / part / f"{subject}_{name}", text.getvalue())


def test_translation(root):
    _generation(root)
    task = tasks.load("wmt16-enro", root=root)
    assert (task.kind, task.num_labels, task.main_metric) == ("seq2seq", 0, "bleu")
    rows = {row["text"]: row["label"] for row in task.splits["train"]}
    assert rows == {
        "translate English to Romanian: A dog.": "Un câine.",
        "translate English to Romanian: A cat.": "O pisică.",
        'translate English to Romanian: He said "hi.': "El și țara.",
    }
    assert [row["label"] for row in task.splits["test"]] == ["O casă.", "Două case și țară."]
    batch = next(iter(task.loader("train", tiny.tokenizer("t5"), 3)))
    assert batch["labels"].shape[0] == 3
    assert (batch["labels"] == -100).any()


def test_misaligned_translation(root):
    _generation(root)
    _write(root / "mt" / "wmt16-enro" / "newstest2016.ro", "O casă.\n")
    with pytest.raises(DataError, match=r"newstest2016.en has 2 lines.*\.ro has 1"):
        tasks.load("wmt16-enro", root=root)


def test_instructions(root):
    _generation(root)
    task = tasks.load("alpaca", root=root)
    rows = [row for split in task.splits.values() for row in split]
    assert len(rows) == 79
    texts = {row["label"]: row["text"] for row in rows}
    assert texts["Done 1."] == "### Instruction:\nDo 1.\n\n### Response:\n"
    assert texts["Done 2."] == "### Instruction:\nDo 2.\n\n### Input:\nx 2\n\n### Response:\n"
    assert task.kind == "causal_lm"


def test_questions(root):
    _generation(root)
    task = tasks.load("mmlu", root=root)
    assert (task.kind, task.label_names, set(task.splits)) == ("multiple_choice", ("A", "B", "C", "D"), {"test"})
    assert len(task.splits["test"]) == 6
    first = task.splits["test"][0]
    question = 'abstract_algebra, "test"\nline\r\ntwo 0\nA. None\nB. \nC. 3,4\nD. d\nAnswer:'
    assert first["text"].endswith(question)
    assert first["text"].count("Answer:") == 6
    assert first["text"].count("Answer: A\n") == 2
    assert first["subject"] == "abstract_algebra"
    assert task.splits["test"]["label"][:3] == [0, 1, 2]
    bare = tasks.load("mmlu", root=root, shots=0).splits["test"][0]["text"]
    assert bare.count("Answer:") == 1
    with pytest.raises(DataError, match=r"shots=6.*abstract_algebra"):
        tasks.load("mmlu", root=root, shots=6)


def test_a_question_keeps_its_end_and_its_answer_is_read_after_it(root):
    _generation(root)
    task, tokenizer = tasks.load("mmlu", root=root), tiny.tokenizer("llama")
    batch = next(iter(task.loader("test", tokenizer, 3, max_length=40)))
    ends = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert all(end.replace(" ", "").endswith("answer:") for end in ends)
    logits = torch.zeros(3, batch["input_ids"].shape[1], len(tokenizer))
    letters = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    for i, mask in enumerate(batch["attention_mask"]):
        logits[i, mask.sum() - 1, letters[batch["labels"][i]]] = 5.0
    choices = task.choice_logits(logits, batch["attention_mask"], tokenizer)
    assert choices.shape == (3, 4)
    assert task.evaluate(choices, batch["labels"])["accuracy"] == 1.0


def test_malformed_question(root):
    _generation(root)
    _write(root / "mmlu" / "test" / "abstract_algebra_test.csv", '"q",1,2,3,4,E\n')
    with pytest.raises(DataError, match=r"abstract_algebra_test.csv, row 1"):
        tasks.load("mmlu", root=root)


# The real files


@real
@pytest.mark.parametrize(
    ("name", "train", "test", "ones"),
    [
        ("cola", 8551, 1043, (6023, 721)),
        ("sst2", 67349, 872, (37569, 444)),
        ("mrpc", 3668, 408, (2474, 279)),
        ("rte", 2490, 277, (1241, 131)),
        ("stsb", 5749, 1500, None),
    ],
)
def test_real_glue_row_counts(name, train, test, ones):
    task = tasks.load(f"glue/{name}", root=REAL, source="folder")
    rows = [*task.splits["train"]["label"], *task.splits["validation"]["label"]]
    assert (len(rows), len(task.splits["test"])) == (train, test)
    if ones:
        assert (sum(rows), sum(task.splits["test"]["label"])) == ones
    else:
        assert np.mean(rows) == pytest.approx(2.701, abs=1e-3)
        assert np.mean(task.splits["test"]["label"]) == pytest.approx(2.364, abs=1e-3)


@real
def test_real_generation_row_counts():
    translation = tasks.load("wmt16-enro", root=REAL, source="folder")
    assert (len(translation.splits["validation"]), len(translation.splits["test"])) == (1999, 1999)
    assert not any(c in text for text in translation.splits["train"]["label"] for c in "şţ")
    alpaca = tasks.load("alpaca", root=REAL, source="folder")
    assert sum(len(rows) for rows in alpaca.splits.values()) == 9225
    questions = tasks.load("mmlu", root=REAL, source="folder", shots=0)
    assert np.bincount(questions.splits["test"]["label"]).tolist() == [3222, 3462, 3582, 3776]
    assert len(set(questions.splits["test"]["subject"])) == 57


def test_reader_takes_the_plain_file_or_its_gz(tmp_path):
    _write(tmp_path / "a.tsv.gz", "x\ty\n1\t2\n")
    assert files.tsv(tmp_path / "a.tsv") == [{"x": "1", "y": "2"}]
    _write(tmp_path / "a.tsv", "\ufeffx\ty\r\n3\t4\r\n")
    assert files.tsv(tmp_path / "a.tsv") == [{"x": "3", "y": "4"}]
    with pytest.raises(SourceError, match=r"no file .*b.tsv and no b.tsv.gz"):
        files.tsv(tmp_path / "b.tsv")
