"""Memory and size, measured. Sources of error are said where the number is made."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Peak memory of a block, in bytes above what was in use when it began.

    On CUDA: the allocator's peak (``kind`` "cuda"). On the CPU: the process's resident set, sampled every 5 ms
    (``kind`` "rss"); it includes what the allocator keeps, so compare it only within one machine and one script.
    """

    def __init__(self) -> None:
        self.kind = "cuda" if torch.cuda.is_available() else "rss"
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.kind == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._process = psutil.Process()
        self._start = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)
            time.sleep(0.005)

    def __exit__(self, *error: object) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._start
        else:
            self._stop.set()
            self._thread.join()
            self.peak = max(self.peak, self._process.memory_info().rss - self._start)


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Sum of the sizes of a folder's files."""
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
