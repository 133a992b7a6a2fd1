"""Labels that are numbers: read strictly, so that a typing error becomes a message and no target."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.foreign import printable
from fedsplit.core.scores import LARGEST_NUMBER

if TYPE_CHECKING:
    from fedsplit.training.data.examples import Request

Numbers = NDArray[np.float64]
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_COMMA = re.compile(r"[+-]?[0-9.]*,[0-9]+")


class _HasOrigin(Protocol):
    def origin(self, i: int) -> str: ...


def read_numbers(request: Request, texts: Sequence[str], items: _HasOrigin) -> Numbers:
    """[N] float64. Raises DataError naming the place of the first text that is no finite number."""
    numbers = np.empty(len(texts), dtype=np.float64)
    for i, text in enumerate(texts):
        if fault := _fault(text):
            raise request.fault(items.origin(i), fault)
        numbers[i] = float(text)
    return numbers


def is_number(text: str) -> bool:
    """Is it a number that a label may be?"""
    return not _fault(text.strip())


def _fault(text: str) -> str:
    """What is wrong with a label that should be a number; empty where nothing is."""
    shown = printable(text, limit=60)
    if not text:
        return "the label is empty; give the sample a number or remove it"
    if _COMMA.fullmatch(text):
        return f"the label {shown!r} has a comma; write the number with a point, without commas, e.g. 1.5"
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return f"the label is {shown!r}, a finite number is wanted; correct it or remove the sample"
    if not _NUMBER.fullmatch(text):
        return (
            f"the label {shown!r} is no number, target=number wants one; correct it, name the right column as "
            f"label-column, or set target=class"
        )
    if not math.isfinite(value := float(text)) or abs(value) > LARGEST_NUMBER:
        return f"the label {shown!r} is larger than {LARGEST_NUMBER:g}; use another unit"
    return ""
