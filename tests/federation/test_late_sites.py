"""Sites slower than the deadline: they stop, say how long they need, and are named with that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from fedsplit.core.errors import FederationError
from fedsplit.core.orders import Order
from fedsplit.federation import messages
from fedsplit.site.time_limit import TimeLimit
from fedsplit.training.data import Batch
from tests.federation.conftest import prepared, settings, simulated


def batches(count: int) -> list[Batch]:
    empty: Any = {}
    return [Batch(empty, torch.zeros(10), None, torch.arange(10).numpy()) for _ in range(count)]


def test_work_ends_with_the_deadline_and_says_how_long_it_takes() -> None:
    limit = TimeLimit(deadline_s=20.0, made=time.time() - 10, planned=60)
    timed = limit.timed(batches(6))
    next(timed)
    next(timed)
    # The first batch came at 10 s; 11 s later two of six are done.
    limit.made -= 11
    with pytest.raises(FederationError, match=r"needs about 43 s for the order, deadline-s=20;"):
        next(timed)


def test_an_order_that_waited_too_long_is_not_begun() -> None:
    made = time.time() - 45
    limit = TimeLimit(20.0, made)
    with pytest.raises(FederationError, match="its order was 45 s old before it could begin"):
        limit.check()
    TimeLimit(0.0, made).check()


def test_a_site_whose_clock_is_behind_stops_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TimeLimit(deadline_s=20.0, made=time.time() + 300)
    limit.check()
    now = time.monotonic()
    monkeypatch.setattr("fedsplit.site.time_limit.time.monotonic", lambda: now + 21)
    with pytest.raises(FederationError):
        limit.check()


def test_a_late_site_is_named_with_what_it_needed(tmp_path: Path) -> None:
    """The site's own word comes after the round's deadline, in the next round, and replaces "no answer"."""

    config = settings(tmp_path, cut="6,6", rounds=2, max_samples=60, min_sites=1)

    def waited(place: int, message: Message) -> bool:
        if place == 2 and message.metadata.group_id == "1":
            # As if it had stood behind another order.
            message.metadata.__dict__["_created_at"] -= 100
            object.__setattr__(config.server, "deadline_s", 6.0)
        return False

    def held_back(place: int, message: Message, reply: Message) -> Message:
        if place == 2 and message.metadata.group_id == "1":
            time.sleep(7.0)
            object.__setattr__(config.server, "deadline_s", 60.0)
        return reply

    hooks = {"silent": waited, "tamper": held_back}
    with prepared(config, simulated(2), in_simulation=False, **hooks) as (run, _):
        summary = run.go()
    (left,) = summary.left_out
    assert (left.site, left.rounds) == ("site-1", (1,))
    assert "its order was 100 s old before it could begin" in left.reason
    assert summary.outcome == "partial"
    assert {m.site for m in run.ledger.metrics if m.round == 2} == {"site-0", "site-1"}


def test_orders_carry_their_time_to_live(tmp_path: Path) -> None:
    config = settings(tmp_path, cut="6,6", rounds=1, max_samples=60, deadline_s=50.0)
    with prepared(config, simulated(2), in_simulation=False) as (run, net):
        run.go()
    orders = [messages.read(m.content, messages.ORDER, Order) for m in net.sent]
    assert {o.deadline_s for o in orders if o.kind != "roll-call"} == {50.0}
    assert {m.metadata.ttl for m in net.sent if m.metadata.message_type == "train"} == {110.0}
