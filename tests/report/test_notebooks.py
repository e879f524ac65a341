"""Notebooks are executed when something that they depend on has changed, and only then; a failure is an error."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from peftlib.errors import UnknownNameError
from peftlib.report import notebooks
from peftlib.report.notebooks import NotebookError

pytestmark = pytest.mark.book

COUNT = """\
from pathlib import Path
count = Path("count.txt")
count.write_text(str(int(count.read_text()) + 1) if count.is_file() else "1")"""


def write(root: Path, name: str, *cells: str, tags: dict[int, str] | None = None) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    for number, tag in (tags or {}).items():
        notebook.cells[number].metadata.tags = [tag]
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def root(tmp_path):
    """A repository with a stand-in for the library, so that kernels start in a second, and no notebooks yet."""
    for folder in ("notebooks", "peftlib", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "requirements.lock").write_text("nothing==1\n")
    (tmp_path / "peftlib" / "__init__.py").write_text("")
    (tmp_path / "peftlib" / "used.py").write_text("ANSWER = 42\n")
    (tmp_path / "peftlib" / "unused.py").write_text("")
    (tmp_path / "peftlib" / "shown" / "templates").mkdir(parents=True)
    for name in ("__init__.py", "templates/table.html.j2", "templates/page.md.j2"):
        (tmp_path / "peftlib" / "shown" / name).write_text("")
    return tmp_path


def executions(root: Path) -> int:
    return int((root / "count.txt").read_text())


def run(root: Path, profile: str = "smoke", **more) -> list[Path]:
    return notebooks.execute_changed(profile, root=root, workers=1, **more)


def test_executed_once_until_something_it_depends_on_changes(root):
    source = write(root, "10_one", COUNT, "from peftlib import shown, used\nprint(used.ANSWER)")
    (target,) = run(root)
    cell = nbformat.read(target, as_version=4).cells[1]
    assert cell.outputs[0].text == "42\n"
    assert not [c for c in nbformat.read(source, as_version=4).cells if c.outputs]

    for name in ("unused.py", "new.py", "shown/templates/page.md.j2"):
        (root / "peftlib" / name).write_text("# changed\n")
    (root / "results" / "run.json").write_text("{}")
    run(root)
    assert executions(root) == 1

    changes = 1
    for path, text in (
        # Of another length: Python takes a module's old bytecode for that of a change of the same second and size.
        (root / "peftlib" / "used.py", "ANSWER = 40 + 3\n"),
        (root / "peftlib" / "shown" / "templates" / "table.html.j2", "changed"),
        (root / "requirements.lock", "nothing==2\n"),
    ):
        path.write_text(text)
        run(root)
        run(root)
        changes += 1
        assert executions(root) == changes, path.name
    write(root, "10_one", COUNT, "from peftlib import used\nprint(used.ANSWER + 1)")
    (target,) = run(root)
    assert executions(root) == changes + 1
    assert nbformat.read(target, as_version=4).cells[1].outputs[0].text == "44\n"

    target.unlink()
    run(root)
    assert executions(root) == changes + 2
    run(root, force=True)
    assert executions(root) == changes + 3


def test_what_changes_during_the_execution_counts_as_changed(root):
    write(root, "10_one", "from peftlib import used\nopen(used.__file__, 'w').write('ANSWER = 0')")
    run(root)
    assert not notebooks.is_fresh(root / "notebooks/10_one.ipynb", "smoke", root)


def test_a_notebook_that_reads_the_store_depends_on_it(root):
    write(root, "10_one", COUNT, "# experiments.Store() is read here")
    run(root)
    run(root)
    assert executions(root) == 1
    (root / "results" / "run.json").write_text("{}")
    run(root)
    assert executions(root) == 2


def test_the_profile_is_given_and_shown_once(root):
    write(root, "10_one", 'PROFILE = "embedded"', "print(PROFILE)", tags={0: "parameters"})
    (smoke,) = run(root)
    executed = nbformat.read(smoke, as_version=4)
    assert [c.source for c in executed.cells] == ['PROFILE = "smoke"', "print(PROFILE)"]
    assert executed.cells[1].outputs[0].text == "smoke\n"
    assert "papermill" not in str(executed)
    (glue,) = run(root, "glue")
    assert glue != smoke
    assert nbformat.read(glue, as_version=4).cells[1].outputs[0].text == "glue\n"
    with pytest.raises(UnknownNameError, match="profile 'huge'"):
        run(root, "huge")


def test_a_failure_names_notebook_cell_and_message_and_the_others_still_run(root):
    write(root, "10_bad", "x = 1", "raise ValueError('the reason')")
    write(root, "20_good", COUNT)
    with pytest.raises(NotebookError, match=r"10_bad\.ipynb failed in cell 2: ValueError: the reason"):
        run(root)
    assert executions(root) == 1
    assert not notebooks.is_fresh(root / "notebooks/10_bad.ipynb", "smoke", root)
    assert notebooks.is_fresh(root / "notebooks/20_good.ipynb", "smoke", root)


def test_an_error_output_is_a_failure_even_where_the_cell_allows_it(root):
    write(root, "10_bad", "1 / 0", tags={0: "raises-exception"})
    with pytest.raises(NotebookError, match=r"10_bad\.ipynb failed in cell 1: ZeroDivisionError"):
        run(root)


def test_stored_errors_are_found():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in ("1", "1 / 0")])
    assert not list(notebooks.problems(notebook))
    error = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero")
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="ZeroDivisionError"), error]
    assert list(notebooks.problems(notebook)) == ["cell 2 holds an error: ZeroDivisionError: division by zero"]


def test_an_unknown_notebook_is_an_error_with_near_names(root):
    write(root, "10_adapters", "x = 1")
    with pytest.raises(UnknownNameError, match="10_adapters"):
        run(root, names=["10_adaptors"])
