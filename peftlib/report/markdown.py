"""Small pieces of MyST Markdown that the generated pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from peftlib.taxonomy import Entry


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "", name: str = "") -> str:
    """A Markdown table. ``align`` holds one letter a column, l (default) or r; ``name`` is a CSS class."""
    align = align.ljust(len(head), "l")
    lines = [head, ["--:" if a == "r" else ":--" for a in align], *rows]
    body = "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)
    return f"{{.{name}}}\n{body}" if name else body


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|").replace("\n", " ")


def dropdown(title: str, body: str) -> str:
    """A part that is folded until the reader opens it."""
    return f":::{{dropdown}} {title}\n{body}\n:::"


def figure(file: str, alt: str, caption: str) -> str:
    """A figure with its caption; ``file`` is relative to the page."""
    return f":::{{figure}} {file}\n:alt: {alt}\n:width: 100%\n\n{caption}\n:::"


def links(entry: Entry, repository: str, chapters: Mapping[str, str], up: str = "") -> dict[str, str]:
    """Where a reader can go on from a method: card, paper, chapter and code, those that there are. ``chapters`` are the
    notebooks' texts by their names; a chapter that does not have the method yet is not linked."""
    found = {"card": f"[card]({up}cards/{entry.name}.md)"}
    if entry.arxiv:
        found["paper"] = f"[arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"
    if f'"{entry.name}"' in chapters.get(entry.chapter, "").replace("\\", ""):
        found["chapter"] = f"[chapter]({up}notebooks/{entry.chapter}.ipynb)"
    found["code"] = f"[code]({repository}/{entry.file})"
    return found
