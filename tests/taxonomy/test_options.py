"""What is read from a method's file is what the file says when it is imported; and torch stays away."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from peftlib import taxonomy
from peftlib.methods.registry import find
from peftlib.taxonomy.options import learning_rate, options


@pytest.mark.parametrize("entry", taxonomy.METHODS, ids=lambda e: e.name)
def test_options_and_rate_are_those_of_the_class(entry):
    cls = find(entry.name)
    assert list(options(entry).items()) == [(f.name, f.default) for f in dataclasses.fields(cls.Config)]
    assert learning_rate(entry) == cls.learning_rate


@pytest.mark.parametrize("command", [["methods"], ["methods", "partial/bias"], ["card", "lora"], ["card", "u_bitfit"]])
def test_lists_and_cards_need_no_torch(command):
    code = f"import sys; from peftlib.cli import main; assert main({command!r}) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
