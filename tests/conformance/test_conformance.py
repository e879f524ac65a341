"""Every method on every family, check by check. ``pytest tests/conformance -k lora-`` runs each of one method's checks
on one family, with ``PEFTLIB_CONFORMANCE=whole`` on all of them. ``=write`` writes what the whole run saw into the
matrix, ``=add`` what a run on one family a check saw."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import peftlib
from peftlib.conformance.case import FAMILIES, supported_family
from peftlib.conformance.checks import CHECKS
from peftlib.conformance.suite import outcome
from tests.conformance import matrix, plugin


def families(method: str, name: str) -> tuple[str, ...]:
    """Where a check runs: on one of its families, another one for each pair of method and check, so that every kind of
    backbone has its turn in every run; on all of them in the whole matrix, and where they are few."""
    every = CHECKS[name].families or ("",)
    if plugin.WHOLE or len(every) <= 4:
        return every
    turn = int(hashlib.sha256(f"{method} {name}".encode()).hexdigest(), 16)
    return (every[turn % len(every)],)


@pytest.mark.parametrize(
    ("method", "family", "name"),
    [
        pytest.param(method, family, name, id=f"{method}-{family or 'one'}-{name}")
        for method in peftlib.methods()
        for name in CHECKS
        for family in families(method, name)
    ],
)
def test_conformance(method: str, family: str, name: str, tmp_path: Path, record_property) -> None:
    family = family or supported_family(method)
    cell = "fails"
    try:
        cell = outcome(method, name, family, tmp_path)
    finally:
        record_property(plugin.PROPERTY, [method, name, family, cell])


def test_every_method_has_a_home():
    """A method that refuses every family would pass all its checks."""
    for method in peftlib.methods():
        assert supported_family(method) in FAMILIES


def test_exceptions_name_checks():
    for method in peftlib.methods():
        for exception in peftlib.card(method).exceptions:
            name, _, family = exception.partition(" on ")
            assert name in CHECKS
            assert not family or family in (CHECKS[name].families or ())


@pytest.mark.skipif(plugin.WRITE, reason="it is being written")
def test_committed_matrix_is_of_these_methods_and_checks():
    document = json.loads(matrix.COMMITTED.read_text())
    way_out = "results/conformance.json is stale: run `make conformance`"
    assert document["checks"] == matrix.titles(), way_out
    assert list(document["methods"]) == peftlib.methods(), way_out
    for method, rows in document["methods"].items():
        for name, check in CHECKS.items():
            known = check.families or (supported_family(method),)
            assert set(families(method, name)) - {""} <= rows[name].keys() <= set(known), way_out
