"""Calls by turns: the order, what they return and raise, and an end in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.federation.engine.in_step import InStep


def noting(turns: InStep[str], said: list[str], name: str, steps: int) -> Callable[[], str]:
    def work() -> str:
        for i in range(steps):
            said.append(f"{name}{i}")
            turns.pause()
        return name

    return work


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_all_go_round_and_end_when_they_are_done(steps: list[int]) -> None:
    turns: InStep[str] = InStep()
    said: list[str] = []
    for i, count in enumerate(steps):
        turns.start(noting(turns, said, "abcdef"[i], count))
    assert len(turns) == len(steps)
    assert said == []
    done = [turns.next_done() for _ in steps]
    # Round by round each that still has steps takes one; with equal steps the earlier call ends first.
    assert said == [
        f"{'abcdef'[i]}{r}" for r in range(5) for i, count in enumerate(steps) if r < count
    ]
    assert done == ["abcdef"[i] for i in sorted(range(len(steps)), key=lambda i: steps[i])]
    assert len(turns) == 0


def test_one_that_comes_later_goes_behind_the_others() -> None:
    turns: InStep[str] = InStep()
    said: list[str] = []
    turns.start(noting(turns, said, "a", 0))
    turns.start(noting(turns, said, "b", 2))
    assert turns.next_done() == "a"
    turns.start(noting(turns, said, "c", 1))
    assert [turns.next_done(), turns.next_done()] == ["c", "b"]
    assert said == ["b0", "c0", "b1"]


def test_what_a_call_raises_is_its_own() -> None:
    turns: InStep[str] = InStep()
    said: list[str] = []

    def bad() -> str:
        turns.pause()
        raise ValueError("boom")

    turns.start(bad)
    turns.start(noting(turns, said, "a", 3))
    with pytest.raises(ValueError, match="boom"):
        turns.next_done()
    assert turns.next_done() == "a"


def test_pause_outside_a_call_is_nothing() -> None:
    turns: InStep[str] = InStep()
    turns.start(partial(str, "a"))
    turns.pause()
    assert turns.next_done() == "a"


def test_close_unwinds_what_is_not_done() -> None:
    """Begun or not; errors' handlers do not see it, but `finally` runs."""
    turns: InStep[str] = InStep()
    said: list[str] = []

    def work() -> str:
        try:
            turns.pause()
        except Exception:  # noqa: BLE001
            said.append("caught")
        finally:
            said.append("unwound")
        return ""

    before = threading.active_count()
    turns.start(work)
    turns.start(noting(turns, said, "a", 1))
    turns.start(noting(turns, said, "b", 0))
    turns.start(noting(turns, said, "c", 1))
    assert turns.next_done() == "b"
    turns.close()
    turns.close()
    assert said == ["a0", "unwound"]
    assert threading.active_count() == before
