"""The cache folder: complete or absent, and where the user says."""

import multiprocessing
from pathlib import Path

import pytest

from peftlib import sources


def test_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path / "own"))
    assert sources.cache_root() == tmp_path / "own"
    monkeypatch.delenv("PEFTLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_root() == tmp_path / "xdg" / "peftlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_root() == Path.home() / ".cache" / "peftlib"


def test_built_once_and_a_failure_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))

    def fails(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        sources.cached_folder("group/thing", fails)
    assert list((tmp_path / "group").iterdir()) == []
    folder = sources.cached_folder("group/thing", lambda f: (f / "whole").write_text("whole"))
    assert [p.name for p in folder.iterdir()] == ["whole"]
    assert sources.cached_folder("group/thing", fails) == folder
    assert [p.name for p in (tmp_path / "group").iterdir()] == ["thing"]


def _build_slowly(barrier):
    def build(folder):
        (folder / "part").write_text("part")
        barrier.wait(timeout=30)

    sources.cached_folder("race", build)


def test_two_processes_may_build_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLIB_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_build_slowly, args=(barrier,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [w.exitcode for w in workers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["race"]
    assert (tmp_path / "race" / "part").read_text() == "part"
