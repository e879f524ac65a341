"""The whole book from notebooks of the profile smoke: executed, rendered without a warning, whole, and on its own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from peftlib import taxonomy
from peftlib.report import book, notebooks
from peftlib.report.pages import repository

from ..project import ROOT

#: Elements that make a browser fetch something, and the attribute that says what.
LOADS = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}
#: Links whose target a browser only fetches on a click.
POINTERS = {"next", "prev", "index", "search", "author", "canonical"}
HOST = r"url\(['\"]?(?:https?:)?//|@import\s+['\"](?:https?:)?//"


class Page(HTMLParser):
    """What a page loads, links to, and which anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.update(values[key] for key in ("id", "name") if values.get(key))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in LOADS and values.get(LOADS[tag]) and values.get("rel") not in POINTERS:
            self.loads.append(values[LOADS[tag]])


def test_a_page_knows_what_a_browser_would_load():
    page = Page(
        '<link rel="stylesheet" href="https://a/b.css"><script src="//c/d.js"></script><link rel="next" href="e.html">'
        '<img id="f" src="f.png"><a href="https://g/">g</a>'
    )
    assert page.loads == ["https://a/b.css", "//c/d.js", "f.png"]
    assert [urlsplit(load).netloc for load in page.loads] == ["a", "c", ""]
    assert page.links == ["https://g/"]
    assert page.anchors == {"f"}


@pytest.mark.book
@pytest.mark.timeout(1500)
def test_book(tmp_path, subtests):
    """One test, so that the book is built once whatever the number of workers."""
    html = book.build("smoke", html=tmp_path / "html")
    names = (path.relative_to(html).as_posix() for path in sorted(html.rglob("*.html")))
    # The theme leaves templates of its own beside its styles.
    pages = {name: Page((html / name).read_text()) for name in names if not name.startswith("_static/")}

    with subtests.test("every notebook was executed, without an error"):
        for source in notebooks.sources():
            executed = nbformat.read(notebooks.executed_path(source, "smoke"), as_version=4)
            code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
            assert code
            assert all(cell.execution_count for cell in code), source.name
            assert not list(notebooks.problems(executed)), source.name
            noise = [o.text for c in code for o in c.outputs if o.output_type == "stream" and o.name == "stderr"]
            assert not noise, source.name

    with subtests.test("nothing is executed again when nothing has changed"):
        assert all(notebooks.is_fresh(source, "smoke") for source in notebooks.sources())

    with subtests.test("every page of the contents is there"):
        expected = {f"cards/{entry.name}.html" for entry in taxonomy.METHODS}
        expected |= {f"notebooks/{source.stem}.html" for source in notebooks.sources()}
        expected |= {f"book/{path.stem}.html" for path in (ROOT / "book").glob("*.md")}
        expected |= {"index.html", "taxonomy.html", "leaderboard.html", "conformance.html", "search.html"}
        assert expected <= pages.keys()

    with subtests.test("nothing is loaded from elsewhere"):
        foreign = {load for page in pages.values() for load in page.loads if urlsplit(load).netloc}
        assert not foreign
        for style in html.rglob("*.css"):
            assert not re.search(HOST, style.read_text(errors="ignore")), style.name

    with subtests.test("what is loaded and linked is there"):
        broken = [
            f"{name}: {link}"
            for name, page in pages.items()
            for link in page.loads + page.links
            if not resolves(name, link, html, pages)
        ]
        assert not broken

    with subtests.test("math is rendered by the book's own MathJax"):
        assert (html / "_static/mathjax/tex-svg.js").read_bytes() == book.mathjax().read_bytes()
        assert any(urlsplit(load).path.endswith("mathjax/tex-svg.js") for load in pages["cards/lora.html"].loads)

    with subtests.test("chapters lead to Colab, at their clean sources"):
        url = (
            repository(ROOT).replace("https://github.com/", "https://colab.research.google.com/github/") + "/notebooks"
        )
        for source in notebooks.sources():
            assert f"{url}/{source.name}" in pages[f"notebooks/{source.stem}.html"].links

    with subtests.test("search knows methods, cards and chapters"):
        index = (html / "searchindex.js").read_text()
        index = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
        assert {"cards/lora", "taxonomy", "notebooks/00_quickstart"} <= set(index["docnames"])
        assert "lora" in index["terms"] | index["titleterms"]

    with subtests.test("a browser without a network shows the math"):
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            pytest.skip("no browser on this machine")
        assert "<mjx-container" in rendered(browser, html / "cards/lora.html", tmp_path / "browser")


def resolves(page: str, link: str, html: Path, pages: dict[str, Page]) -> bool:
    """Whether a link inside the book leads to a file, and its anchor to a place in it."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc or link in ("#", ""):
        return True
    target = ((html / page).parent / unquote(parts.path)).resolve() if parts.path else html / page
    if target.is_dir():
        target = target / "index.html"
    if not target.is_file():
        return False
    name = target.relative_to(html.resolve()).as_posix()
    return not parts.fragment or name not in pages or unquote(parts.fragment) in pages[name].anchors


def rendered(browser: str, page: Path, profile: Path) -> str:
    """The page as the browser has it after its scripts ran; every host name is unknown to it."""
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    options = ("headless", "no-sandbox", "disable-gpu", *quiet, "virtual-time-budget=20000", "dump-dom")
    offline = ("host-resolver-rules=MAP * ~NOTFOUND", f"user-data-dir={profile}")
    command = [browser, *(f"--{option}" for option in (*options, *offline)), page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
