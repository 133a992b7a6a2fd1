"""What the sections of the settings have in common: their base, their keys, and the marks that fields may carry."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from pydantic import AfterValidator, BaseModel, ConfigDict

from fedsplit.core.errors import ConfigError
from fedsplit.core.names import RULE, is_name, normalised

Check = tuple[bool, str]
"""Is it wrong, and the sentence that says what to do."""


class Mark(Enum):
    """What holds for a key beside its value; stands in its field's `Annotated`."""

    ANEW = "a resumed run takes it from its new settings; all else is what the run was started with"
    SERVERS_OWN = "the server's own affair: orders to sites do not carry it"


ANEW: Final = Mark.ANEW
SERVERS_OWN: Final = Mark.SERVERS_OWN


def kebab(name: str) -> str:
    """A field's name as Flower and the command line spell it."""
    return name.replace("_", "-")


class Section(BaseModel):
    """Some of a run's settings. Units stand in the names; a line of prose below each field says what it is for."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=kebab, populate_by_name=True
    )

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together; `across.py` has those of several sections."""
        return []


def read_by(parse: Callable[[str], object]) -> AfterValidator:
    """A field's check: `parse` reads it. What `parse` says of a bad value is told of the key."""

    def check(value: str) -> str:
        try:
            parse(value)
        except ConfigError as err:
            raise ValueError(str(err)) from err
        return value

    return AfterValidator(check)


def a_name(most: int, *, or_empty: bool = False) -> AfterValidator:
    """A field's check: a name of at most so many characters, kept in the form in which names are compared."""

    def check(value: str) -> str:
        name = normalised(value)
        if not is_name(name, most) and (name or not or_empty):
            raise ValueError(f"no name: 1 to {most} {RULE} are wanted")
        return name

    return AfterValidator(check)
