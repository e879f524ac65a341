"""Templates show text as it is, whatever signs of Markdown or HTML it holds."""

from __future__ import annotations

import html
import json
import re

import jinja2
import pytest
import yaml
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser

from peftlib.report import Standings, conformance, pages, rendering

from ..project import ROOT
from .stored import make

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b || c",
    r"a \| b \ c",
    "*a* **b** _c_ __d__ ~~e~~",
    "`a` ``b",
    "[a](https://example.org) ![b](c) <https://example.org>",
    "&lt; &amp; &#60;",
    "one\ntwo",
    "{role}`a` $x$ $$y$$",
    "adapter_drop_2 (1 - 2) #3!",
]


def rendered(text: str) -> str:
    """The HTML of a page's Markdown, with the syntax that the book has switched on; what is folded is unfolded."""
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["parse"]["myst_enable_extensions"]
    parser = create_md_parser(MdParserConfig(enable_extensions=set(extensions)), RendererHTML)
    return parser.render(re.sub("^:::.*$", "", text, flags=re.M))


def cells(page: str) -> list[str]:
    """What a reader sees in the cells of a table."""
    return [html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<td[^>]*>(.*?)</td>", page, re.S)]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_shows_its_text(text):
    for_pages = rendering.MARKDOWN.from_string('{% from "macros.md.j2" import table %}{{ table(rows) }}')
    rows = [{text: text, "code": rendering.code(text), "link": rendering.link(text, "a.md"), "number": 1}]
    seen = text.replace("\n", " ")
    assert cells(rendered(for_pages.render(rows=rows))) == [seen, seen, seen, "1"]
    assert cells(rendering.render("table.html.j2", rows=[{text: text}])) == [text]


def test_a_value_that_a_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="rows"):
        rendering.render("table.html.j2")


def test_pages_show_what_run_files_say(tmp_path):
    """The names of processors; what a check is, and why it does not hold."""
    store = make(tmp_path)
    compared = [r for r in store.records("embedded", "few-shot") if r["spec"]["learning_rate"] == 2e-3]
    assert len(compared) > len(HOSTILE)
    for run, text in zip(compared, HOSTILE):
        path = next(store.root.rglob(f"*{run['key']}.json"))
        path.write_text(path.read_text().replace('"A test"', json.dumps(text)))
    checks = {str(number): text for number, text in enumerate(HOSTILE, 1)}
    row = {check: conformance.Cell({"bert": f"no: {text}"}) for check, text in checks.items()}
    leaderboard = html.unescape(rendered(pages.leaderboard_page(Standings(store, "embedded"))))
    matrix = html.unescape(rendered(pages.conformance_page(conformance.Matrix(checks, {"ia3": row}))))
    for number, text in checks.items():
        seen = text.replace("\n", " ")
        assert f"Measured on {seen}, 1 threads, torch 2.13.0." in leaderboard
        assert f"<li>{seen}</li>" in matrix
        assert f"<li>ia3, check {number}: {seen}</li>" in matrix
