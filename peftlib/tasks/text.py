"""Text made comparable, and decisions drawn from its hash: the same on every machine and in every version."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_WORD = re.compile(r"[^\W_]+")


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
