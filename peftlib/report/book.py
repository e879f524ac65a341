"""Build the book: executed notebooks, prose and generated pages, laid out in ``_build/source/<profile>`` and rendered.

The Sphinx source is a copy of the repository's ``book/`` and ``notebooks/`` in the same layout, so that links and Colab
buttons point at the clean sources, with executed notebooks in place of theirs and the generated pages added.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console

from peftlib.errors import PeftlibError
from peftlib.report import notebooks, pages

ROOT = notebooks.ROOT
SOURCE, HTML = "_build/source", "_build/html"
MATHJAX = "book/_static/mathjax/tex-svg.js"
"""Where the source has its copy of MathJax: one file that needs no fonts and no network."""


class BookError(PeftlibError, RuntimeError):
    """A book that did not build without warnings."""


def assemble(profile: str, root: Path = ROOT) -> Path:
    """Lay out the Sphinx source. A file is written only when its content changes, so that builds stay incremental.

    Raises BookError where a notebook was never executed on the profile.
    """
    target = root / SOURCE / profile
    wanted: dict[Path, bytes] = {}
    for name in ("_config.yml", "_toc.yml"):
        wanted[Path(name)] = (root / name).read_bytes()
    for path in sorted((root / "book").rglob("*")):
        if path.is_file():
            wanted[path.relative_to(root)] = path.read_bytes()
    executed = {source: notebooks.executed_path(source, profile, root) for source in notebooks.sources(root=root)}
    if missing := [source.stem for source, path in executed.items() if not path.is_file()]:
        raise BookError(
            f"profile {profile!r} has no executed notebook for {', '.join(missing)}: run "
            f"`peftlib book --profile {profile}` without --no-execute"
        )
    for source, path in executed.items():
        wanted[source.relative_to(root)] = path.read_bytes()
    wanted[Path(MATHJAX)] = mathjax().read_bytes()
    for name, content in pages.generate(root).items():
        if Path(name) in wanted:
            raise BookError(f"the generated page {name} would replace a file of book/; rename one of them")
        wanted[Path(name)] = content if isinstance(content, bytes) else content.encode()
    changed = []
    for path in sorted(target.rglob("*")) if target.exists() else ():
        relative = path.relative_to(target)
        if relative.parts[0] != "_build" and path.is_file() and relative not in wanted:
            path.unlink()
            changed.append(relative)
    for name, content in wanted.items():
        path = target / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            if name.is_relative_to("book/_static"):
                changed.append(name)
    if changed:
        # Sphinx neither takes away the pages of removed files nor copies static files where no page has changed.
        shutil.rmtree(target / "_build", ignore_errors=True)
    return target


def mathjax() -> Path:
    """MathJax's file for TeX to SVG, from the package that carries it."""
    files = metadata.files("sphinx-mathjax-offline") or ()
    return Path(next(file for file in files if file.name == "tex-svg.js").locate())


def build(profile: str = "embedded", *, execute: bool = True, root: Path = ROOT, html: Path | None = None) -> Path:
    """Execute what changed, generate pages, render; return the folder of the HTML, ``_build/html`` by default.

    Warnings are errors, a failed notebook or an error output is too. Raises BookError or NotebookError.
    """
    console = Console(stderr=True)
    started = time.perf_counter()
    if execute:
        notebooks.execute_changed(profile, root=root)
    source = assemble(profile, root)
    console.print("book: rendering")
    program = "from jupyter_book.cli.main import main; main()"
    command = [sys.executable, "-c", program, "build", str(source), "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if done.returncode:
        # The next build would not read these pages again, and would not warn.
        shutil.rmtree(source / "_build", ignore_errors=True)
        raise BookError(f"the book did not build without warnings:\n{(done.stdout + done.stderr)[-4000:]}")
    html = html or root / HTML
    shutil.rmtree(html, ignore_errors=True)
    shutil.copytree(source / "_build/html", html)
    console.print(f"book: {html}/index.html after {time.perf_counter() - started:.0f} s")
    return html


def main(profile: str, *, execute: bool = True) -> int:
    """The ``peftlib book`` command."""
    build(profile, execute=execute)
    return 0
