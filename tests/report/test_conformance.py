"""The matrix that the conformance suite writes, as the book reads it."""

from __future__ import annotations

import json

import pytest

from peftlib.errors import DataError
from peftlib.report import conformance
from peftlib.report.conformance import Cell


@pytest.mark.parametrize(
    ("families", "sign"),
    [
        ({"bert": "yes", "t5": "yes"}, "2"),
        ({"bert": "yes", "t5": "not supported: no biases"}, "1"),
        ({"bert": "yes", "t5": "no: relative positions"}, "1–"),
        ({"bert": "no: a reason", "t5": "no: a reason"}, "–"),
        ({"bert": "fails", "t5": "yes"}, "✗1"),
        ({"t5": "not supported: no biases"}, ""),
        ({}, ""),
    ],
)
def test_sign(families, sign):
    assert Cell(families).sign == sign


def test_a_reason_stands_once_and_names_its_families_where_they_are_not_all():
    assert Cell({"bert": "no: it is nonlinear", "t5": "no: it is nonlinear"}).reasons() == ["it is nonlinear"]
    assert Cell({"bert": "yes", "t5": "no: x", "mt5": "no: x"}).reasons() == ["t5, mt5: x"]
    assert Cell({"bert": "no: y", "t5": "no: x: z"}).reasons() == ["bert: y", "t5: x: z"]


def test_read(tmp_path):
    assert conformance.read(tmp_path) is None
    path = tmp_path / conformance.FILE
    path.parent.mkdir()
    path.write_text(
        json.dumps(
            {
                "checks": {"start": "Start", "merge": "Merge"},
                "methods": {"lora": {"start": {"bert": "yes"}, "merge": {"bert": "no: why"}}},
            }
        )
    )
    matrix = conformance.read(tmp_path)
    assert matrix.checks == {"start": "Start", "merge": "Merge"}
    assert matrix.methods["lora"]["merge"].declined == {"bert": "why"}
    assert matrix.tally("lora") == {"passed": 1, "declined": 1}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"checks": {}, "methods": []}'])
def test_another_file_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / conformance.FILE
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DataError, match="conformance"):
        conformance.read(tmp_path)
