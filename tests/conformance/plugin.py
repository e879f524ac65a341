"""Collects the cells from the reports of a run, wherever its workers are, and writes the matrix of a whole one."""

from __future__ import annotations

import json

PROPERTY = "conformance"


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

        if not matrix.complete(self.cells):
            return
        document = matrix.document(self.cells)
        matrix.write(document, matrix.BUILT)
        committed = json.loads(matrix.COMMITTED.read_text()) if matrix.COMMITTED.is_file() else None
        self.stale = committed != document

    def pytest_terminal_summary(self, terminalreporter):
        if self.stale:
            terminalreporter.write_line(
                "results/conformance.json differs from what was seen in this run: `make conformance`", yellow=True
            )
