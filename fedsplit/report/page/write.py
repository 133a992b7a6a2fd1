"""A page as HTML or as Markdown. Here, and only here, text is escaped: all of it, for names come from runs and sites."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedsplit.core.foreign import printable
from fedsplit.report.page.blocks import Page
from fedsplit.report.words import Words

_MOST_CHARS = 20_000
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~!])")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:; base-uri 'none'; form-action 'none'"


def as_html(page: Page) -> str:
    """One file, which loads nothing and runs nothing."""
    return _html().get_template("page.html").render(
        page=page, say=Words(page.lang), policy=POLICY, style=Markup(_file("page.css"))
    )  # fmt: skip


def as_markdown(page: Page) -> str:
    """The same without pictures."""
    text = _markdown().get_template("page.md").render(page=page, say=Words(page.lang))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def spans(refs: Sequence[int]) -> list[tuple[str, int]]:
    """1, 2, 3, 7 as (1-3, 1), (7, 7): what is shown, and the number that it leads to."""
    found: list[list[int]] = []
    for number in refs:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [(f"{a}" if a == b else f"{a}-{b}", a) for a, b in found]


@functools.cache
def _html() -> Environment:
    made = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_plain,
    )  # fmt: skip
    made.filters |= {"spans": spans, "svg": _svg, "hint": _hint}
    return made


@functools.cache
def _markdown() -> Environment:
    # What finalize gives is Markup, which autoescape leaves alone: Markdown's escapes are not HTML's.
    made = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_marked,
    )  # fmt: skip
    made.filters |= {"spans": spans, "code": _code, "raw": Markup}
    return made


def _plain(value: Any) -> Any:
    """What a template writes: without characters that turn a line round or cannot be seen."""
    return value if isinstance(value, Markup) else printable(value, limit=_MOST_CHARS)


def _marked(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    text = _MARKS.sub(r"\\\1", printable(value, limit=_MOST_CHARS))
    # A line that begins so would be a list or a heading of its own.
    text = re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return Markup(re.sub(r"^(\s*)([-+=])", r"\1\\\2", text))


def _code(text: str) -> Markup:
    return Markup("\n".join(f"    {line}" for line in text.splitlines()))


def _svg(text: str) -> Markup:
    """A picture of our own making, in which matplotlib has escaped all text."""
    return Markup(text)


def _hint(refs: Sequence[int], sources: Sequence[str]) -> str:
    """What the numbers beside a figure stand for, shown where the pointer rests on them."""
    return " | ".join(sources[number - 1] for number in refs)


def _file(name: str) -> str:
    return (files("fedsplit.report.page") / name).read_text(encoding="utf-8")
