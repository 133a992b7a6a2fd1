"""A round that was lost is done once more: with the same result as if nothing had been, and told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsplit.core.errors import DataError, FederationError, RefusedError, UnreachableError
from fedsplit.federation import messages
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from tests.federation.conftest import prepared, settings, simulated
from tests.federation.test_run import adapter

SMALL = {"rounds": 3, "max_samples": 60, "cut": "2,5", "encoder_training": "hosted"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    with prepared(settings(tmp_path_factory.mktemp("whole"), **SMALL), simulated(2)) as (run, _):
        assert run.go().outcome == "complete"
        return adapter(run)


def assert_as_if_nothing_had_been(run: Run, undisturbed: dict[str, np.ndarray], why: str) -> None:
    summary = run.summary
    assert summary is not None
    assert (summary.outcome, summary.left_out, summary.rounds_done) == ("complete", (), 3)
    (note,) = [n for n in summary.notes if "once more" in n]
    assert note.startswith("round 2 is done once more: ")
    assert why in note
    ours = adapter(run)
    assert all(np.array_equal(undisturbed[n], ours[n]) for n in undisturbed)
    rows = sorted((m.round, m.site) for m in run.ledger.metrics)
    assert rows == sorted(set(rows))
    assert [(m.round, m.site) for m in run.dir.read_metrics()].count((2, "site-0")) == 1


def once(group: str, happens: Callable[[], Any]) -> Callable[[int, Message], bool]:
    """A hook at the first order of a round, or at each of its sites' first orders."""
    done: set[str] = set()

    def hook(place: int, message: Message) -> bool:
        if message.metadata.group_id == group and group not in done:
            done.add(group)
            happens()
        return False

    return hook


def test_an_encoder_that_forgot_the_module(
    undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """What a restart does: the version is gone, and sites are refused until it is published again."""
    hosts: list[Any] = []
    hook = once("2", lambda: hosts[0]._versions.clear())
    with prepared(settings(tmp_path, **SMALL), simulated(2), leaves=hook) as (run, _):
        hosts.append(run.endpoint.publish.__self__)  # type: ignore[attr-defined]
        run.go()
    assert_as_if_nothing_had_been(run, undisturbed, "is not published here")


def test_what_the_encoder_trained_is_lost(
    undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with prepared(settings(tmp_path, **SMALL), simulated(2)) as (run, _):
        collect, asked = run.endpoint.collect, []

        def forgetful(version: str) -> Any:
            asked.append(version)
            if len(asked) == 2:
                raise RefusedError("module version is not here")
            return collect(version)

        run.endpoint = replace(run.endpoint, collect=forgetful)
        run.go()
    assert asked == ["run/1", "run/2", "run/2/again", "run/3"]
    assert_as_if_nothing_had_been(run, undisturbed, "could not be collected")


def test_all_sites_are_silent(undisturbed: dict[str, np.ndarray], tmp_path: Path) -> None:
    lost: list[int] = []
    config = settings(tmp_path, **SMALL)

    def silent(place: int, message: Message) -> bool:
        if message.metadata.group_id != "2" or len(lost) == 2:
            # A round's deadline is looked at before its orders go out.
            if message.metadata.group_id == "1" and not lost:
                object.__setattr__(config.server, "deadline_s", 2.0)
            return False
        lost.append(place)
        if len(lost) == 2:
            object.__setattr__(config.server, "deadline_s", 60.0)
        return True

    with prepared(config, simulated(2), silent=silent) as (run, _):
        run.go()
    assert sorted(lost) == [1, 2]
    assert_as_if_nothing_had_been(run, undisturbed, "no answer within")


def test_a_round_that_is_lost_twice_ends_the_run(tmp_path: Path) -> None:
    config = settings(tmp_path, **SMALL | {"cut": "6,6", "encoder_training": "frozen"})

    def leaves(place: int, message: Message) -> bool:
        lost = message.metadata.group_id == "2"
        object.__setattr__(config.server, "deadline_s", 1.0 if lost else 60.0)
        return lost

    with (
        prepared(config, simulated(2), leaves=leaves) as (run, _),
        pytest.raises(FederationError, match=r"done twice"),
    ):
        run.go()
    assert run.summary is not None
    assert {(e.site, e.rounds) for e in run.summary.left_out} == {
        ("site-0", (2,)),
        ("site-1", (2,)),
    }
    assert run.summary.rounds_done == 1


def test_a_refusal_that_lasts_is_not_tried_again(tmp_path: Path) -> None:
    def broken(place: int, message: Message, reply: Message) -> Message:
        if message.metadata.group_id != "1":
            return reply
        return messages.fault_reply(DataError("a.jpg is no image"), message, site="")

    config = settings(tmp_path, rounds=1, max_samples=60, cut="6,6")
    with (
        prepared(config, simulated(2), tamper=broken) as (run, net),
        pytest.raises(FederationError, match=r"a\.jpg is no image"),
    ):
        run.go()
    assert sum(m.metadata.group_id == "1" for m in net.sent) == 2


def test_an_encoder_that_is_down_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsplit.federation.server.endpoint.RETRY_S", 0.01)
    calls: list[str] = []

    def publish(version: str, packed: bytes) -> None:
        calls.append(version)
        if len(calls) < 3:
            raise UnreachableError("nobody answers at x:1")

    endpoint = Endpoint("x:1", b"k", False, "", publish, lambda version: {})
    said: list[str] = []
    endpoint.deliver("run/1", b"", wait_s=30, on_update=said.append)
    assert calls == ["run/1"] * 3
    assert said == ["the encoder is waited for, up to 30 s: nobody answers at x:1"]
    calls.clear()
    with pytest.raises(UnreachableError):
        endpoint.deliver("run/1", b"", wait_s=0, on_update=said.append)
