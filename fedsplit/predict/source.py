"""One input, a source of many, and what reading them depends on. Who reads which kind: inputs.py and rows.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedsplit.model.families import InputKind
from fedsplit.model.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Input:
    """One thing to predict."""

    name: str
    """What stands in the answers' column `input`: a path with its folder as given, a text, or an array with a position."""
    sample: object = None
    """As `Predictor.prepare` takes it; a path is read when its turn comes."""
    where: str = ""
    """The place in a file, for faults; empty where the name says it."""
    fault: str = ""
    """Why there is no sample."""


@dataclass(eq=False)
class Source:
    """Inputs of one argument. `total` is how many, None where nobody knows before the end."""

    total: int | None
    read: Callable[[], Iterator[Input]]
    notes: list[str] = field(default_factory=list)
    """What was guessed or passed over, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What reading depends on."""

    kind: InputKind
    inputs: Inputs
    """How the module's run prepared its own."""
    classes: tuple[str, ...]
    column: str = ""
    """Of texts or of image files in a table; empty: `text` or `file`."""
