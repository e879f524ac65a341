"""Text made comparable, and decisions drawn from its hash: the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator

_WORD = re.compile(r"[^\W_]+")
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|jr|sr|prof|vs|etc|no|vol|e\.g|i\.e|[a-z])\.$", re.IGNORECASE)


def normalized(text: str) -> str:
    """Lower-case words of letters and digits without accents, joined by single spaces.

    Texts that differ only in case, punctuation, accents or spacing are the same text to every split.
    """
    text = text.casefold()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(_WORD.findall(text))


def fraction(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the key and the salt alone and is spread evenly over keys."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def sentences(text: str) -> Iterator[str]:
    """Sentences of a text; its line breaks end sentences too."""
    for line in text.split("\n"):
        start = 0
        for end in _END.finditer(line):
            if not _ABBREVIATION.search(line[max(0, end.start() - 8) : end.start()]):
                yield line[start : end.end()].strip()
                start = end.end()
        if line[start:]:
            yield line[start:]
