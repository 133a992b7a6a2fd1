"""Computations go to sites in turn, however many streams a site has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fedsplit.model.turns import FairTurns


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(turns: FairTurns) -> int:
    return sum(map(len, turns._waiting.values()))


def test_a_site_with_four_streams_gets_as_many_turns_as_one_with_one() -> None:
    turns, order = FairTurns(1), list[str]()

    def compute(site: str, times: int) -> None:
        for _ in range(times):
            with turns.of(site):
                order.append(site)

    with turns.of("first"):
        threads = [threading.Thread(target=compute, args=("many", 3)) for _ in range(4)]
        threads += [threading.Thread(target=compute, args=("one", 4))]
        for thread in threads:
            thread.start()
        wait_for(lambda: waiting(turns) == 5)
    for thread in threads:
        thread.join(20)
    assert len(order) == 16
    # While both want to compute, neither has more than the other by more than a turn or two.
    last_of_one = len(order) - 1 - order[::-1].index("one")
    both = order[: last_of_one + 1]
    assert abs(both.count("many") - both.count("one")) <= 2, order
    assert turns._free == 1


def test_as_many_at_once_as_there_are_places() -> None:
    turns, ran = FairTurns(2), threading.Event()

    def compute() -> None:
        with turns.of("b"):
            ran.set()

    thread = threading.Thread(target=compute)
    with turns.of("a"), turns.of("a"):
        thread.start()
        wait_for(lambda: waiting(turns) == 1)
        assert not ran.is_set()
    thread.join(20)
    assert ran.is_set()
    assert turns._free == 2


def test_a_computation_that_fails_gives_its_place_back() -> None:
    turns = FairTurns(1)
    for _ in range(3):
        try:
            with turns.of("a"):
                raise ValueError
        except ValueError:
            pass
    assert turns._free == 1
