"""Turns: one at a time, in order, and nobody waits for ever."""

from __future__ import annotations

import threading
import time

import pytest

from fedsplit.model.turns import Turns


def waiting(turns: Turns, who: str, got: list[str]) -> threading.Thread:
    """A thread that has asked for the turn, and notes when it has it."""

    def run() -> None:
        turns.take(who)
        got.append(who)

    before = len(turns._queue)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while len(turns._queue) == before:
        time.sleep(0.001)
    return thread


def test_turns_come_in_the_order_of_asking() -> None:
    turns, got = Turns(), list[str]()
    turns.take("a")
    turns.take("a")  # who has it has it
    threads = [waiting(turns, who, got) for who in "bcd"]
    assert got == []
    for holder, thread in zip("abc", threads, strict=True):
        turns.give("d")  # not d's to give
        turns.give(holder)
        thread.join(10)
    assert got == ["b", "c", "d"]
    turns.give("d")
    turns.give("d")
    turns.take("e")


def test_nobody_waits_longer_for_others_than_it_should(caplog: pytest.LogCaptureFixture) -> None:
    turns, got = Turns(wait_s=0.3), list[str]()
    turns.take("dead")
    began = time.monotonic()
    threads = [waiting(turns, who, got) for who in "abc"]
    for thread in threads:
        thread.join(10)
    assert got == ["a", "b", "c"]
    assert caplog.text.count("ran out") == 3
    assert time.monotonic() - began >= 0.1
    turns.give("dead")  # it comes back late, when the turn is another's
    assert turns._queue[0] == "c"


def test_without_anybody_else_a_turn_lasts() -> None:
    turns = Turns(wait_s=0.0)
    turns.take("a")
    time.sleep(0.01)
    turns.take("a")
    assert list(turns._queue) == ["a"]
