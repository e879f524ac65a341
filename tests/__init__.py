"""The test suite: ``tests.<folder>`` are importable names, so that folders may share helpers."""
