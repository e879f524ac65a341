"""The taxonomy is whole, says nothing malformed, and agrees with the references and with the files on disk."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
from pybtex.database import BibliographyData, parse_file
from pybtex.plugin import find_plugin

import peftlib
from peftlib import taxonomy
from peftlib.errors import UnknownNameError
from peftlib.methods.registry import find, stand_ins
from peftlib.taxonomy import CATEGORIES, METHODS, Entry

PACKAGE = Path(peftlib.__file__).parent
SURVEY = [e for e in METHODS if e.origin == "survey"]

# RoBERTa-base without its task head, and the two-class head.
SHAPE = {"L": 12, "d": 768, "f": 3072, "H": 12, "V": 50265, "total": 124_055_040, "head": 592_130, "pooler": 0}

# What the words of `sites` can be: the sites of peftlib.anatomy, and kinds of tensors.
SITES = {
    *(f"{block}.{part}" for block in ("attention", "cross_attention") for part in ("query", "key", "value", "output")),
    "attention.heads",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
    "norms",
    "embeddings",
    "head",
    "layers",
    "weights",
    "biases",
}

# The LaTeX commands in use; all are in MathJax's base and ams packages.
NAMES = """
    alpha beta delta Delta ell eta gamma lambda mathcal nabla omega phi Pi sigma Sigma tau theta Lambda
    arg approx bar begin bigl bigr Bigl Bigr cos dots end exp frac ge hat in leftarrow log max mathbb mathrel mathrm
    mid min odot operatorname otimes partial propto qquad quad sim sqrt sum text tfrac tilde times top widehat
"""
COMMANDS = {*NAMES.split(), *"{}|, \\"}


def values_for(entry: Entry) -> dict:
    """The shape with the config's defaults."""
    return SHAPE | dataclasses.asdict(find(entry.name).Config()) | {"sources": stand_ins(entry.name)}


def check_latex(source: str) -> None:
    """Raise AssertionError where TeX source has unbalanced delimiters, dollars or an unknown command."""
    assert "$" not in source
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", source):
        depth += 1 if brace == "{" else -1
        assert depth >= 0, f"a closing brace too many: {source}"
    assert depth == 0, f"an open brace: {source}"
    for left, right in (("bigl", "bigr"), ("Bigl", "Bigr")):
        opened, closed = (len(re.findall(rf"\\{side}(?![a-zA-Z])", source)) for side in (left, right))
        assert opened == closed, f"unequal numbers of \\{left} and \\{right}: {source}"
    unknown = set(re.findall(r"\\([a-zA-Z]+|.)", source)) - COMMANDS
    assert not unknown, f"commands {sorted(unknown)} are not known to be in MathJax"


def every(entries=METHODS):
    return pytest.mark.parametrize("entry", entries, ids=lambda e: e.name)


@pytest.fixture(scope="module")
def references() -> BibliographyData:
    return parse_file(PACKAGE.parent / "book" / "references.bib")


# The tree


def test_59_methods_in_five_classes():
    assert len(SURVEY) == 59
    assert Counter(e.category.split("/")[0] for e in SURVEY) == {
        "additive": 22,
        "partial": 10,
        "reparameterized": 17,
        "hybrid": 7,
        "unified": 3,
    }
    assert Counter(e.category for e in SURVEY) == {
        "additive/adapters": 10,
        "additive/soft_prompts": 7,
        "additive/others": 5,
        "partial/bias": 3,
        "partial/pretrained_weight_masking": 2,
        "partial/delta_weight_masking": 5,
        "reparameterized/low_rank": 3,
        "reparameterized/lora/rank_adjustment": 3,
        "reparameterized/lora/weight_update": 2,
        "reparameterized/lora/quantization": 3,
        "reparameterized/lora/improvements": 3,
        "reparameterized/lora/multitask": 3,
        "hybrid/manual": 4,
        "hybrid/automatic": 3,
        "unified": 3,
    }


def test_order_is_the_survey_s_with_the_baselines_last():
    classes = [e.category.split("/")[0] for e in METHODS]
    order = ["additive", "partial", "reparameterized", "hybrid", "unified", "since_survey", "baselines"]
    assert classes == sorted(classes, key=order.index)
    paths = [c.path for c in CATEGORIES]
    assert [e.category for e in METHODS] == sorted([e.category for e in METHODS], key=paths.index)
    assert [e.name for e in METHODS[-2:]] == ["full", "head"]


def test_names_and_paths_are_unique_identifiers():
    names = [e.name for e in METHODS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name.islower() for name in names)
    paths = [c.path for c in CATEGORIES]
    assert len(set(paths)) == len(paths)
    assert all(part.isidentifier() for path in paths for part in path.split("/"))


def test_every_branch_hangs_on_the_tree_and_has_a_chapter_where_methods_are():
    paths = [c.path for c in CATEGORIES]
    for c in CATEGORIES:
        assert not c.parent or paths.index(c.parent) < paths.index(c.path)
        assert c.title
        assert c.summary
        if c.path != "since_survey":
            assert bool(c.chapter) == any(e.category == c.path for e in METHODS)
        assert re.fullmatch(r"\d\d_[a-z_]+", c.chapter) or not c.chapter
    chapters = [c.chapter for c in CATEGORIES if c.chapter and c.path != "baselines"]
    assert chapters == sorted(chapters)


def test_tree_holds_every_method_once():
    def walk(nodes):
        for node in nodes:
            assert all(e.category == node.category.path for e in node.entries)
            assert all(child.category.parent == node.category.path for child in node.children)
            yield from (e.name for e in node.entries)
            yield from walk(node.children)

    assert list(walk(taxonomy.tree())) == [e.name for e in METHODS]
    (multitask,) = [n for n in taxonomy.tree("reparameterized/lora") if n.category.path.endswith("multitask")]
    assert [e.name for e in multitask.entries] == ["lorahub", "moelora", "l_lora"]


# The functions


def test_methods_by_category():
    assert taxonomy.methods("partial/bias") == ["bitfit", "u_bitfit", "s_bitfit"]
    assert taxonomy.methods("unified") == ["adamix", "sparse_adapter", "propetl"]
    assert len(taxonomy.methods("reparameterized/lora")) == 14
    assert taxonomy.methods() == [e.name for e in METHODS]
    assert taxonomy.methods()[-2:] == ["full", "head"]


def test_a_category_is_not_the_prefix_of_another_one_s_name():
    assert "lora" in taxonomy.methods("reparameterized/low_rank")
    with pytest.raises(UnknownNameError, match="'reparameterized/lo'"):
        taxonomy.methods("reparameterized/lo")


@pytest.mark.parametrize(
    ("name", "near"), [("lorra", "lora"), ("bit_fit", "bitfit"), ("prefixtuning", "prefix_tuning")]
)
def test_unknown_method_names_near_names(name, near):
    with pytest.raises(UnknownNameError, match=f"unknown method '{name}'; did you mean .*'{near}'"):
        taxonomy.entry(name)


@pytest.mark.parametrize("name", [None, 3, ["lora"]])
def test_unknown_method_of_another_type(name):
    with pytest.raises(UnknownNameError, match="unknown method"):
        taxonomy.entry(name)


def test_unknown_category_names_near_paths():
    for ask in (taxonomy.category, taxonomy.methods, taxonomy.tree):
        with pytest.raises(UnknownNameError, match=r"did you mean .*'partial/bias'"):
            ask("partial/biases")


# The entries


@every()
def test_entry_is_complete(entry):
    for field in ("title", "cite", "summary", "equation", "symbols", "trains", "count", "start_note", "merge_note"):
        assert getattr(entry, field).strip(), field
    for field in ("summary", "symbols", "trains", "start_note", "merge_note"):
        assert getattr(entry, field).endswith("."), field
    assert entry.sites
    assert set(entry.sites) <= SITES
    assert len(set(entry.sites)) == len(entry.sites)
    assert entry.start in ("identity", "near", "changed")
    assert entry.merge in ("exact", "no")
    assert entry.chapter == taxonomy.category(entry.category).chapter
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.original) or not entry.original


@every()
def test_equation_and_symbols_are_sound_latex(entry):
    check_latex(entry.equation)
    text, *math = re.split(r"\$([^$]*)\$", entry.symbols)
    assert entry.symbols.count("$") % 2 == 0
    assert math, "symbols without any mathematics"
    for source in math[::2]:
        check_latex(source)
    for words in (text, *math[1::2], entry.summary, entry.trains, entry.start_note, entry.merge_note, *entry.life):
        assert "\\" not in words
        assert "$" not in words


def test_the_latex_check_can_fail():
    for wrong in (r"\frac{a}{b", r"a}{", r"\bigl(a)", r"$a$", r"\notacommand{a}"):
        with pytest.raises(AssertionError):
            check_latex(wrong)


@every()
def test_count_is_a_whole_number_on_roberta_base(entry):
    count = entry.trained(**values_for(entry))
    assert count == 0 if entry.name == "head" else count > 0
    assert count <= 2 * SHAPE["total"]


@every()
def test_count_uses_the_shape_and_the_config_only(entry):
    allowed = {"ceil", "enumerate", "int", "len", "max", "min", "round", "sum"} | values_for(entry).keys()
    for source in stand_ins(entry.name):
        allowed |= {"config"} | source.config.as_dict().keys()
    assert set(compile(entry.count, entry.name, "eval").co_names) <= allowed


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # The survey's table, less the two-class head.
        ("full", {"last_layers": None}, 124_055_040),
        ("lora", {"rank": 8}, 887_042 - 592_130),
        ("adalora", {}, 1_991_520),
        ("prompt_tuning", {"length": 20}, 607_490 - 592_130),
        ("prefix_tuning", {"length": 20, "reparametrize": False}, 960_770 - 592_130),
        ("bitfit", {}, 694_274 - 592_130),
        # 0.033 % of BERT-base.
        ("hadamard_adapter", {}, 36_864),
        # 0.0009 % of the encoder's layers: one query.
        ("attention_fusion", {}, 768),
        ("ia3", {}, 55_296),
    ],
)
def test_known_counts(name, options, expected):
    entry = taxonomy.entry(name)
    assert entry.trained(**values_for(entry) | options) == expected


def test_qlora_counts_every_linear_map():
    # LLaMA has a third feed-forward map, so the encoder's formula is checked by hand: four d x d, two d x f.
    by_hand = 12 * 64 * (4 * (768 + 768) + 2 * (768 + 3072))
    entry = taxonomy.entry("qlora")
    assert entry.trained(**values_for(entry) | {"rank": 64}) == by_hand


def test_count_names_what_is_missing():
    with pytest.raises(UnknownNameError, match="parameter formula of lora 'rank'"):
        taxonomy.entry("lora").trained(**SHAPE)
    broken = dataclasses.replace(taxonomy.entry("lora"), count="L / 5")
    with pytest.raises(ValueError, match="no whole number"):
        broken.trained(**SHAPE)


# The references


@every()
def test_paper_is_in_the_references(entry, references):
    assert entry.cite in references.entries
    if entry.arxiv:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
        assert references.entries[entry.cite].fields["eprint"] == entry.arxiv


def test_every_reference_renders(references):
    style = find_plugin("pybtex.style.formatting", "unsrt")()
    backend = find_plugin("pybtex.backends", "text")()
    formatted = list(style.format_bibliography(references))
    assert len(formatted) == len(references.entries)
    for reference in formatted:
        text = reference.text.render(backend)
        assert not set("{}\\") & set(text), text


def test_every_reference_says_who_and_when(references):
    eprints = [e.fields["eprint"] for e in references.entries.values() if "eprint" in e.fields]
    assert len(set(eprints)) == len(eprints)
    for key, reference in references.entries.items():
        assert reference.persons["author"], key
        assert re.fullmatch(r"(19|20)\d\d", reference.fields["year"]), key
        assert not reference.fields["title"].endswith("."), key
        assert ("eprint" in reference.fields) == ("archiveprefix" in reference.fields), key


# The files


def test_every_method_file_has_an_entry_and_lies_in_its_category():
    files = {
        p.relative_to(PACKAGE.parent).as_posix()
        for p in (PACKAGE / "methods").glob("*/**/*.py")
        if p.name not in ("__init__.py", "layer.py", "search.py", "bayesian.py") and "bases" not in p.parts
    }
    assert files <= {e.file for e in METHODS}
    assert files == {e.file for e in METHODS}


def test_every_folder_of_methods_is_a_category():
    folders = {p.parent.relative_to(PACKAGE / "methods").as_posix() for p in (PACKAGE / "methods").glob("*/**/*.py")}
    packages = {f"{e.category}/{e.name}" for e in METHODS} | {"bases", "bases/hf_peft"}
    assert folders - packages <= {c.path for c in CATEGORIES}
    for folder in folders:
        assert (PACKAGE / "methods" / folder / "__init__.py").is_file()


@every(METHODS)
def test_method_is_found_and_named_after_its_file(entry):
    cls = find(entry.name)
    assert cls.__module__ in (entry.module, f"{entry.module}.method")
    assert cls.Config().method == entry.name


@every(SURVEY)
def test_the_method_s_file_names_its_paper(entry, references):
    name = f"arXiv:{entry.arxiv}" if entry.arxiv else references.entries[entry.cite].fields["doi"]
    assert name in importlib.import_module(find(entry.name).__module__).__doc__
