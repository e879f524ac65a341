"""Reading benchmark files as they are released: plain or gzipped, and never quoted unless their format is."""

from __future__ import annotations

import csv
import gzip
import io
import os
from pathlib import Path

from peftlib.errors import DataError, SourceError


def data_root(root: str | os.PathLike | None) -> Path | None:
    """The folder with benchmark files: ``root``, else ``$PEFTLIB_DATA``, else None."""
    chosen = root or os.environ.get("PEFTLIB_DATA")
    return Path(chosen).expanduser() if chosen else None


def find(path: Path) -> Path | None:
    """``path``, or ``path`` with .gz appended, whichever exists."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def read(path: Path) -> str:
    """The text of a file or of its .gz form, with the line ends that it has.

    Raises SourceError where neither exists, DataError where the file is damaged.
    """
    found = find(path)
    if found is None:
        raise SourceError(f"no file {path} and no {path.name}.gz beside it")
    data = found.read_bytes()
    try:
        return (gzip.decompress(data) if found.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{found} is damaged: {error}") from error


def lines(path: Path) -> list[str]:
    """Lines between line feeds alone: the other characters that Python counts as line ends occur inside texts."""
    text = read(path)
    return text.removesuffix("\n").split("\n") if text else []


def tsv(path: Path, columns: tuple[str, ...] = (), *, skip_short: bool = False) -> list[dict[str, str]]:
    """Rows of an unquoted tab-separated file; ``columns`` name them where the file has no header.

    skip_short: leave out rows with too few cells (QQP is released with some); otherwise they are a DataError.
    """
    found = lines(path)
    if not found:
        raise DataError(f"{path} is empty")
    start = 0
    if not columns:
        columns, start = tuple(found[0].rstrip("\r").split("\t")), 1
    rows = []
    for number, line in enumerate(found[start:], start + 1):
        cells = line.rstrip("\r").split("\t")
        if len(cells) < len(columns):
            if skip_short:
                continue
            raise DataError(f"{path}, line {number}: {len(cells)} cells where {len(columns)} are due: {line[:80]!r}")
        rows.append(dict(zip(columns, cells)))
    return rows


def quoted_csv(path: Path) -> list[list[str]]:
    """Rows of a quoted CSV file without a header. Line breaks inside quotes stay as they are, "None" is a text."""
    return list(csv.reader(io.StringIO(read(path), newline=""), strict=True))
