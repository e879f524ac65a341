"""Collects the cells from the reports of a run, wherever its workers are. After a run without a failure they are
compared with the committed matrix, or written into it (``make conformance``)."""

from __future__ import annotations

import json
import os

import pytest

PROPERTY = "conformance"
WRITE = os.environ.get("PEFTLIB_CONFORMANCE") in ("write", "add")
WHOLE = os.environ.get("PEFTLIB_CONFORMANCE") in ("write", "whole")


class Collector:
    """A pytest plugin; it does nothing in a run without conformance tests."""

    def __init__(self):
        self.cells: list[tuple[str, str, str, str]] = []
        self.stale = False

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.cells.extend(tuple(value) for name, value in report.user_properties if name == PROPERTY)

    def pytest_sessionfinish(self, session):
        if not self.cells or hasattr(session.config, "workerinput"):
            return
        from tests.conformance import matrix

        if any(outcome == "fails" for *_, outcome in self.cells):
            return
        committed = json.loads(matrix.COMMITTED.read_text()) if matrix.COMMITTED.is_file() else {"methods": {}}
        if WRITE:
            matrix.write(matrix.updated(committed, self.cells), matrix.COMMITTED)
        elif any(matrix.cell(committed, m, c, f) not in (outcome, None) for m, c, f, outcome in self.cells):
            self.stale = True
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.stale:
            terminalreporter.write_line(
                "results/conformance.json is not what this run saw: write it again with `make conformance`", red=True
            )
