"""Reading flat kebab-case keys: the command line's `KEY=VALUE` pairs, and errors in words. Called by config.py."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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
            faults.append(f"{pair!r} has no '='; use KEY=VALUE")
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
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key[:100]!r}; {hint}"


def fault(error: Any) -> str:
    """One of pydantic's errors as key=value: what is wrong."""
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if where and not message.startswith(where):
        shown = repr(error["input"])
        return f"{where}={shown if len(shown) < 200 else shown[:200] + '...'}: {message}"
    return message
