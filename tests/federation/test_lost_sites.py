"""Sites that go away in a run, with the error that Flower itself answers then; and how they come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Message

from fedsplit.core.errors import DataError, FederationError
from fedsplit.federation import messages
from tests.federation.conftest import prepared, settings, simulated


def in_group(place: int, group: str) -> Callable[[int, Message], bool]:
    """True for what the site at `place` is sent in a round."""
    return lambda at, message: at == place and message.metadata.group_id == group


def test_a_site_that_is_lost_is_left_out_by_name_and_the_run_goes_on(tmp_path: Path) -> None:
    config = settings(tmp_path, cut="6,6", rounds=3, max_samples=90)
    with prepared(config, simulated(3), leaves=in_group(2, "2")) as (run, _):
        summary = run.go()
    assert (summary.outcome, summary.rounds_done) == ("partial", 3)
    (left,) = summary.left_out
    # The last module is tested by a message of its own, which the site misses too.
    assert (left.site, left.rounds) == ("site-1", (2, 3, 4))
    assert "it is not connected any more" in left.reason
    assert {m.site for m in run.ledger.metrics if m.round == 3} == {"site-0", "site-2"}


@pytest.mark.parametrize("kind", ["statistics", "calibrate", "local-only"])
def test_a_site_that_is_lost_before_the_first_round(kind: str, tmp_path: Path) -> None:
    def leaves(at: int, message: Message) -> bool:
        text = str(message.content.config_records["order"]["json"])
        return at == 2 and f'"kind":"{kind}"' in text

    other = {"compare_local_only": True} if kind == "local-only" else {"classifier_init": "ridge"}
    config = settings(tmp_path, cut="6,6", rounds=1, max_samples=90, **other)
    with prepared(config, simulated(3), leaves=leaves) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    assert {entry.site for entry in summary.left_out} == {"site-1"}
    assert summary.rounds_done == 1


def test_too_few_sites_left_ends_the_run_in_words(tmp_path: Path) -> None:
    config = settings(tmp_path, cut="6,6", rounds=1, max_samples=60, deadline_s=2.0)
    with (
        prepared(config, simulated(2), leaves=in_group(2, "1")) as (run, _),
        pytest.raises(FederationError, match=r"site-1: it is not connected any more"),
    ):
        run.go()
    assert run.summary is not None
    assert run.summary.outcome == "failed"


def test_an_error_that_nobody_foresaw_leaves_an_account_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a status that says `training` for ever."""
    config = settings(tmp_path, cut="6,6", rounds=2, max_samples=60)
    with prepared(config, simulated(2)) as (run, net):
        push = net.push_messages

        def breaks(orders: Iterable[Message]) -> Iterable[str]:
            orders = list(orders)
            if orders[0].metadata.group_id == "2":
                raise KeyError("\x1b[1m of Flower")
            return push(orders)

        monkeypatch.setattr(net, "push_messages", breaks)
        with pytest.raises(KeyError):
            run.go()
    summary = run.dir.read_summary()
    assert summary is not None
    assert (summary.outcome, summary.rounds_done) == ("failed", 1)
    assert "an error that fedsplit does not know: KeyError: '\\x1b[1m of" in summary.reason
    status = json.loads((run.dir.path / "status.json").read_text())
    assert (status["phase"], status["message"]) == ("failed", summary.reason)
    assert (run.dir.path / "module").is_dir()


@pytest.mark.parametrize("failing", [1, 2])
def test_sites_that_cannot_train_alone(failing: int, tmp_path: Path) -> None:
    def broken(place: int, message: Message, reply: Message) -> Message:
        if place > failing or message.metadata.message_type == "query":
            return reply
        return messages.fault_reply(DataError("a.jpg is no image"), message, site="")

    config = settings(tmp_path, method="local-only", rounds=1, max_samples=60, min_sites=1)
    with prepared(config, simulated(2), tamper=broken) as (run, _):
        if failing == 2:
            with pytest.raises(FederationError, match=r"the start got 0 useful answers.*a\.jpg"):
                run.go()
        else:
            run.go()
    summary = run.summary
    assert summary is not None
    assert summary.outcome == ("failed" if failing == 2 else "partial")
    assert "it could not train alone: a.jpg is no image" in summary.left_out[0].reason
