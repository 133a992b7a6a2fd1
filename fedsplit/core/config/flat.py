"""Reading flat kebab-case keys: the command line's `KEY=VALUE` pairs, and errors in words."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from fedsplit.core.errors import ConfigError

Flat = dict[str, str | int | float | bool]


def read_pairs(pairs: list[str], kinds: Mapping[str, Any]) -> Flat:
    """Read `KEY=VALUE` pairs, typed by `kinds` (key -> annotation). Raises ConfigError for one without `=`."""
    flat: Flat = {}
    faults: list[str] = []
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq:
            faults.append(f"{pair!r} has no '='; use KEY=VALUE{_half_width(pair)}")
        else:
            # from_flat reports unknown keys together with all other faults.
            flat[key] = _typed(value, kinds.get(key))
    if faults:
        raise ConfigError("the settings have faults:\n" + "\n".join(f"  - {f}" for f in faults))
    return flat


def _typed(value: str, kind: Any) -> str | int | float | bool:
    """The value in its key's type where it reads as such; pydantic says the rest."""
    if kind is bool and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if kind is int and _is_integer(value):
        return int(value)
    if kind is float and is_number(value):
        return float(value)
    return value


def is_number(text: str) -> bool:
    """Does the text read as a float?"""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    # Python refuses to read numbers of thousands of digits.
    return digits.isascii() and digits.isdigit() and len(digits) < 1000


def unknown(key: str, known: set[str]) -> str:
    """That a key is not known, with the nearest one that is."""
    return f"unknown key {key[:100]!r}; {suggestion(key, sorted(known), 'known keys:')}"


def suggestion(given: str, known: Iterable[str], otherwise: str) -> str:
    """What may have been meant: the same in another case or width, names that begin so, or the nearest; else all."""
    names = list(known)
    plain = _plain(given)
    same = [name for name in names if name == plain]
    longer = [name for name in names if len(plain) > 3 and name.startswith(f"{plain}-")]
    near = same or longer or difflib.get_close_matches(plain, names, n=1)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"{otherwise} {', '.join(names)}"


def _plain(text: str) -> str:
    """A word as keys and names are written: half width, small letters, '-' between words."""
    return unicodedata.normalize("NFKC", text[:200]).strip().lower().replace("_", "-")


def _half_width(text: str, before: str = "") -> str:
    """A hint where a text has full-width characters, as Japanese input methods write them; else nothing."""
    half = unicodedata.normalize("NFKC", text[:200])
    wide = any(unicodedata.east_asian_width(c) == "F" for c in text[:200])
    return f"; it has full-width characters, write {before}{half}" if wide else ""


def fault(error: Any) -> str:
    """One of pydantic's errors as key=value: what is wrong."""
    # The first part is the section, which no key names.
    where = ".".join(str(part) for part in error["loc"][1:])
    message = str(error["msg"]).removeprefix("Value error, ")
    if where and not message.startswith(where):
        shown = repr(error["input"])
        wide = _half_width(str(error["input"]), f"{where}=")
        return f"{where}={shown if len(shown) < 200 else shown[:200] + '...'}: {message}{wide}"
    return message
