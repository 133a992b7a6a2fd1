"""Names of classes: written one way, and names that a person would take for the same.

Two sites spell one class alike only by luck: composed and decomposed characters, blanks, capitals, full-width letters. What
cannot be meant (Unicode's two forms, blanks at the ends) is made equal; what might be is told. Used where data are read,
where settings are read, and at roll call.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_WHOLE = re.compile(r"([+-]?[0-9]{1,18})\.0{1,18}")
EMPTY_WORDS = frozenset({"nan", "null", "none", "n/a", "#n/a", "na", "<na>", "nil"})
"""What programs write in place of a label that is not there."""


def normal(name: str) -> str:
    """The name in Unicode's composed form (NFC), without blanks at its ends."""
    return unicodedata.normalize("NFC", name).strip()


def plain(name: str) -> str:
    """What two spellings of one class have in common: its normal form, and of a whole number its digits ("1.0" -> "1")."""
    name = normal(name)
    match = _WHOLE.fullmatch(name)
    return match[1] if match else name


def whole_numbers(names: Iterable[str]) -> dict[str, str]:
    """Name -> the whole number that it stands for ("1.0" -> "1"), if all names are numbers; else nothing."""
    found: dict[str, str] = {}
    for name in names:
        match = _WHOLE.fullmatch(name)
        if match is not None:
            found[name] = match[1]
        elif not (name.lstrip("+-").isdecimal() and name.isascii()):
            return {}
    return found


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of different names that look like one: by case, width, blanks, or a number's decimals."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_shape(name), set()).add(name)
    return [tuple(sorted(group)) for _, group in sorted(groups.items()) if len(group) > 1]


def _shape(name: str) -> str:
    plain = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    plain = plain.replace("-", "").replace("_", "") or plain
    match = _WHOLE.fullmatch(plain)
    return match[1] if match else plain
