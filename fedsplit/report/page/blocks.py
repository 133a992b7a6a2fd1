"""What a page is made of: sections of text, tables, figures and pictures, each with the numbers of its sources.

The two templates, HTML and Markdown, write the same blocks. Nothing in a block is escaped; the templates do that. Only
pictures are markup, of our own making.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Mood = Literal["", "good", "warning", "bad"]
Tone = Literal["", "good", "bad", "strong", "dim"]


@dataclass(frozen=True)
class Cell:
    """One field of a table."""

    text: str
    tone: Tone = ""
    refs: tuple[int, ...] = ()
    hint: str = ""
    """Shown where the pointer rests."""
    assumed: bool = False
    """Does it rest on an assumption?"""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the columns named in `numbers` stand at the right."""

    kind: Literal["table"] = field(default="table", init=False)
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""
    left: tuple[int, ...] = (0,)
    """Columns of words; all others are numbers."""
    refs: tuple[int, ...] = ()
    """The sources of all of it."""
    tight: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: Literal["text"] = field(default="text", init=False)
    text: str
    tone: Literal["", "warning", "note", "lead"] = ""
    refs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: Literal["items"] = field(default="items", init=False)
    items: tuple[Cell, ...]


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: Literal["code"] = field(default="code", init=False)
    text: str


@dataclass(frozen=True)
class Picture:
    """An SVG element, and what it shows in a sentence."""

    kind: Literal["picture"] = field(default="picture", init=False)
    svg: str
    caption: str
    refs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Big:
    """One of the figures that a page leads with."""

    label: str
    value: str
    bounds: str
    note: str = ""
    assumed: bool = False
    refs: tuple[int, ...] = ()
    lead: bool = False


@dataclass(frozen=True)
class Bigs:
    """Figures beside each other."""

    kind: Literal["bigs"] = field(default="bigs", init=False)
    figures: tuple[Big, ...]


Block = Table | Text | Items | Code | Picture | Bigs


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: tuple[Block, ...]
    level: Literal[1, 2, 3] = 2
    new_page: bool = False


@dataclass(frozen=True)
class Page:
    """A whole report."""

    lang: str
    title: str
    subtitle: str
    state: str
    """How the run ended, in a word."""
    tone: Mood
    sections: tuple[Section, ...]
    sources: tuple[str, ...]
    """Source number 1 first."""
    made: str
    """By what and when, at the foot."""


class Sources:
    """Numbers the sources in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def ref(self, *texts: str) -> tuple[int, ...]:
        """The numbers of some sources, each once."""
        numbers = [self._numbers.setdefault(text, len(self._numbers) + 1) for text in texts]
        return tuple(sorted(set(numbers)))

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(self._numbers)


def row(cells: Iterable[str | Cell]) -> tuple[Cell, ...]:
    """A table's row; plain text is a cell without more."""
    return tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in cells)


def facts(pairs: Sequence[tuple[str, str | Cell]], *, refs: tuple[int, ...] = ()) -> Table:
    """Names and what they are, beside each other."""
    return Table(columns=(), rows=tuple(row(pair) for pair in pairs), left=(0, 1), refs=refs)
