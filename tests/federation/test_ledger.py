"""The summary's numbers, from metrics made by hand; a run that lost a site never reads as complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.config import RunConfig
from fedsplit.core.orders import LocalOnly, RollCall
from fedsplit.core.records import RoundMetrics, Summary
from fedsplit.core.scores import CLASS_SCORES, Tally
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.model.backbone import Backbone
from tests.core.test_records import METRICS
from tests.federation.test_messages import CALL


def row(round_: int, site: str, right: int, tested: int, **other: Any) -> RoundMetrics:
    """By default a round in which the site trained."""
    values = {
        "round": round_, "site": site, "correct_global": right, "test_samples": tested,
        "correct_personal": right, "loss": 0.5, "bytes_activation_up": 100,
        "bytes_activation_down": 200, "bytes_module_up": 10, "bytes_module_down": 20,
        "seconds_device": 1.0, "seconds_wait": 0.25, "peak_rss_bytes": 1000 * round_,
    }  # fmt: skip
    return RoundMetrics.model_validate(METRICS | values | other)


def only_tested(site: str, right: int, samples: int) -> RoundMetrics:
    """The last round, which only tests."""
    return row(
        3, site, right, samples, loss=None, correct_personal=None, samples=0, bytes_module_up=0
    )


@pytest.fixture
def ledger(tiny: dict[str, Path]) -> Ledger:
    """Two rounds of two sites and the last test."""
    made = Ledger(
        RunConfig.from_flat({"rounds": 2, "task": "parts"}), Backbone.find(str(tiny["vit"])), "r-1"
    )
    for name, samples, tests in [("b", 30, 10), ("a", 8, 2)]:
        made.calls[name] = RollCall.model_validate(
            CALL | {"site": name, "samples": samples, "test_samples": tests}
        )
    made.cuts = {"a": "0,4", "b": "2,2"}
    made.metrics = [
        row(1, "a", 0, 2, correct_personal=1), row(1, "b", 3, 10, correct_personal=4),
        row(2, "a", 1, 2, correct_personal=2), row(2, "b", 5, 10, correct_personal=9),
        only_tested("a", 2, 2), only_tested("b", 7, 10),
    ]  # fmt: skip
    return made


def summary(ledger: Ledger, **other: Any) -> Summary:
    values: dict[str, Any] = {"rounds_done": 2, "outcome": "complete", "reason": ""}
    return ledger.summary(**(values | other))


def test_loads_are_counted_by_process(ledger: Ledger) -> None:
    """A resident process loads once, also where it did before the run; a process a message loads each time."""
    ledger.metrics = [
        row(1, "a", 0, 2, process="p", backbone_loads=0), row(2, "a", 0, 2, process="p", backbone_loads=0),
        row(1, "b", 0, 2, process="q", backbone_loads=1), row(2, "b", 0, 2, process="r", backbone_loads=1),
        row(3, "b", 0, 2, process="r", backbone_loads=1),
    ]  # fmt: skip
    a, b = ledger.summary(rounds_done=2, outcome="complete", reason="").sites
    assert (a.backbone_loads, b.backbone_loads) == (1, 3)


def test_a_whole_run(ledger: Ledger) -> None:
    result = summary(ledger)
    assert (result.outcome, result.reason, result.left_out) == ("complete", "", ())
    assert (result.run, result.task, result.rounds, result.rounds_done) == ("r-1", "parts", 2, 2)
    # All test samples count alike: 0 + 3, 1 + 5 and 2 + 7 of 12.
    assert result.accuracy_by_round == pytest.approx((3 / 12, 6 / 12, 9 / 12))
    assert result.accuracy_global_start == pytest.approx(3 / 12)
    assert result.accuracy_global == pytest.approx(9 / 12)
    assert result.bytes_activation == 6 * 300
    assert result.bytes_module == 4 * 30 + 2 * 20
    # Both ways, for each of the four times that a site trained; the last test is not one.
    assert result.bytes_full_model == 2 * 4 * ledger.backbone.weight_bytes()
    assert result.backbone_sha256 == ledger.backbone.sha256
    assert result.accuracy_local_only is None
    assert result.module == "module"
    assert Summary.model_validate_json(result.model_dump_json()) == result


def test_a_sites_row(ledger: Ledger) -> None:
    a, b = summary(ledger).sites
    assert (a.name, a.cut, a.samples, a.test_samples) == ("a", "0,4", 8, 2)
    assert (b.name, b.cut, b.samples, b.test_samples) == ("b", "2,2", 30, 10)
    assert (a.accuracy_before, a.accuracy, a.accuracy_personal) == (0.0, 1.0, 1.0)
    assert (b.accuracy_before, b.accuracy, b.accuracy_personal) == pytest.approx((0.3, 0.7, 0.9))
    assert (a.bytes_up, a.bytes_down) == (3 * 100 + 2 * 10, 3 * 220)
    assert (a.seconds_device, a.seconds_wait) == (3.0, 0.75)
    assert a.peak_rss_bytes == 3000
    assert a.rounds_missed == 0
    assert a.accuracy_local_only is None


def test_the_order_of_the_lines_does_not_matter(ledger: Ledger) -> None:
    before = summary(ledger)
    ledger.metrics.reverse()
    after = summary(ledger)
    assert after.model_copy(update={"wall_s": before.wall_s}) == before


def test_training_alone(ledger: Ledger) -> None:
    for name, own, everywhere in [("a", 1, 3), ("b", 8, 6)]:
        ledger.local_only[name] = LocalOnly(
            site=name,
            own=Tally(sums={"correct": own}, samples=ledger.calls[name].test_samples),
            everywhere=Tally(sums={"correct": everywhere}, samples=12),
        )
    result = summary(ledger)
    assert result.accuracy_local_only == pytest.approx((3 / 12 + 6 / 12) / 2)
    assert [s.accuracy_local_only for s in result.sites] == pytest.approx([0.25, 0.5])
    assert [s.accuracy_local_only_personal for s in result.sites] == pytest.approx([0.5, 0.8])


def test_training_alone_without_test_samples(ledger: Ledger) -> None:
    nothing = CLASS_SCORES.nothing
    ledger.local_only["a"] = LocalOnly(site="a", own=nothing, everywhere=nothing)
    result = summary(ledger)
    assert result.accuracy_local_only is None
    assert result.sites[0].accuracy_local_only is None


def test_a_lost_site_makes_the_run_partial_and_is_named(ledger: Ledger) -> None:
    ledger.metrics = [m for m in ledger.metrics if (m.site, m.round) != ("b", 2)]
    ledger.absent(2, "b", "no answer within 5 s")
    result = summary(ledger)
    assert result.outcome == "partial"
    assert result.reason == "not every site took part in every round: b"
    (left,) = result.left_out
    assert (left.site, left.rounds, left.reason) == ("b", (2,), "no answer within 5 s")
    assert [s.rounds_missed for s in result.sites] == [0, 1]
    # The curve is over those that answered.
    assert result.accuracy_by_round == pytest.approx((3 / 12, 1 / 2, 9 / 12))


def test_a_site_that_never_came_is_named_too(ledger: Ledger) -> None:
    ledger.absent(0, "(site 3 of 3)", "it was not connected")
    result = summary(ledger)
    assert result.outcome == "partial"
    assert "(site 3 of 3)" in result.reason
    assert result.left_out[0].rounds == (0,)
    assert [s.rounds_missed for s in result.sites] == [0, 0]


def test_absences_are_grouped_by_site_and_reason(ledger: Ledger) -> None:
    for round_, site, why in [
        (2, "b", "late"),
        (1, "b", "late"),
        (3, "b", "crash"),
        (1, "a", "late"),
    ]:
        ledger.absent(round_, site, why)
    result = summary(ledger)
    assert [(x.site, x.rounds, x.reason) for x in result.left_out] == [
        ("a", (1,), "late"), ("b", (3,), "crash"), ("b", (1, 2), "late"),
    ]  # fmt: skip
    assert [s.rounds_missed for s in result.sites] == [1, 3]


def test_a_refused_update_in_a_round_counts_once(ledger: Ledger) -> None:
    """The same round may be noted twice, as unanswered and as refused."""
    ledger.absent(1, "b", "late")
    ledger.absent(1, "b", "its update was refused")
    assert [s.rounds_missed for s in summary(ledger).sites] == [0, 1]


def test_a_failed_run_stays_failed(ledger: Ledger) -> None:
    ledger.absent(2, "b", "late")
    result = summary(ledger, outcome="failed", reason="too few sites", rounds_done=1)
    assert (result.outcome, result.reason) == ("failed", "too few sites")
    assert result.accuracy_by_round == pytest.approx((3 / 12, 6 / 12))
    assert result.left_out[0].site == "b"


def test_a_run_that_never_began(tiny: dict[str, Path]) -> None:
    empty = Ledger(RunConfig(), Backbone.find(str(tiny["vit"])), "r")
    result = summary(empty, rounds_done=0, outcome="failed", reason="nobody came")
    assert result.sites == ()
    assert (result.accuracy_global, result.accuracy_global_start) == (None, None)
    assert result.accuracy_by_round == ()
    assert result.bytes_full_model == 0


def test_a_site_that_only_called(ledger: Ledger) -> None:
    ledger.metrics = [m for m in ledger.metrics if m.site == "a"]
    _, b = summary(ledger).sites
    assert (b.accuracy_before, b.accuracy, b.accuracy_personal) == (None, None, None)
    assert (b.bytes_up, b.peak_rss_bytes) == (0, 0)


def test_a_resumed_runs_wall_time_goes_on(ledger: Ledger) -> None:
    ledger.wall_before_s = 1000.0
    assert 1000.0 <= summary(ledger).wall_s < 1060.0
