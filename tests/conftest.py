"""Settings that every test runs under. They are read at import time by torch and transformers, so they stand first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def pytest_configure(config):
    from tests.conformance.plugin import Collector

    config.pluginmanager.register(Collector(), "conformance")
