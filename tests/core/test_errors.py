"""The exception tree is the one that its docstring draws."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from fedsplit.core import errors
from fedsplit.core.errors import EncoderError, FedsplitError, OverloadedError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def test_the_docstring_draws_the_tree() -> None:
    drawn = re.findall(r"^ *[│├└─ ]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(c.__name__ for c in ALL)


@pytest.mark.parametrize("error", ALL)
def test_each_has_one_place_in_the_tree(error: type[FedsplitError]) -> None:
    assert issubclass(error, FedsplitError)
    assert len(error.__bases__) == 1
    assert error.__doc__


def test_what_lies_between_a_site_and_the_encoder() -> None:
    below = {c.__name__ for c in ALL if issubclass(c, EncoderError)} - {"EncoderError"}
    assert below == {"RefusedError", "ProtocolError", "OverloadedError", "UnreachableError"}


def test_overload_says_when_to_come_back() -> None:
    error = OverloadedError("full", retry_after_s=2.5)
    assert error.retry_after_s == 2.5
    assert str(error) == "full"


@pytest.mark.parametrize("error", [c for c in ALL if c is not OverloadedError])
def test_they_survive_a_process_boundary(error: type[FedsplitError]) -> None:
    again = pickle.loads(pickle.dumps(error("why")))
    assert type(again) is error
    assert str(again) == "why"
