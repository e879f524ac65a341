"""Settings that every test runs under. They are read at import time by torch and transformers, so they stand first."""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


# The suite's checks are assertions in the library, and should say as much as those of a test.
pytest.register_assert_rewrite("peftlib.conformance.checks")


def pytest_configure(config):
    from tests.conformance.plugin import Collector

    config.pluginmanager.register(Collector(), "conformance")


def pytest_collection_finish():
    # Trainer and torch.compile collect garbage again and again, and would each time look through the imported modules
    # and the thousands of tests, which stay.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
