"""The templates of the generated pages and tables: Jinja2, with everything escaped that is not marked as markup.

HTML templates take HTML's escapes. In Markdown templates text stands as it is: signs that would be markup or HTML there
are escaped. Text of our own that is Markdown, such as the taxonomy's, is marked ``safe`` in the template.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# An underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<>{}$&~]|(?<![^\W_])_|_(?![^\W_])")


def render(template: str, /, **values: Any) -> str:
    """The template of this name in ``templates/`` with these values; it ends with one line break, and at most one empty
    line in a row. Raises jinja2's UndefinedError for a value that the template misses."""
    environment = MARKDOWN if template.endswith(".md.j2") else HTML
    text = environment.get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plain(value: Any) -> Any:
    """Text with its signs of Markdown escaped, on one line; what is markup, or no text, as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(_MARKUP.sub(r"\\\g<0>", value.replace("\n", " ")))


def code(text: str) -> Markup:
    """Text as a code span."""
    text = text.replace("\n", " ")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def link(text: str, target: str) -> Markup:
    """A link to a file of the book or an address."""
    return Markup(f"[{plain(text)}]({target})")


def cell(value: Any) -> Markup:
    """A value in a row of a table, where lines and bars separate."""
    return Markup(str(plain(value)).replace("\n", " ").replace("|", r"\|"))


def numeric(value: Any) -> bool:
    """Whether a table's value is a number, written with digits only or with ``, . - e`` between them."""
    return re.sub("[-,.e]", "", str(value)).isdigit()


HTML = Environment(
    loader=PackageLoader("peftlib.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
HTML.tests["numeric"] = numeric
MARKDOWN = HTML.overlay(finalize=plain)
MARKDOWN.filters |= {"cell": cell, "code": code, "fmt": format}
