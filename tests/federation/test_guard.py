"""Bounds on updates, what sites count for, and the step back: hostile sites are held off, honest ones are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsplit.core.aggregation import Update, capped
from fedsplit.core.config import RunConfig
from fedsplit.core.orders import DELTA, STATISTICS, Answer, Calibration, Order, RollCall
from fedsplit.core.records import RoundMetrics
from fedsplit.federation import messages
from fedsplit.federation.server.combine.guard import Guard, Version
from tests.core.test_records import METRICS
from tests.federation.conftest import prepared, settings, simulated

# What sites count for.


@pytest.mark.parametrize(
    ("samples", "counts"),
    [
        # Nobody has more than all others or three times the median.
        ([100, 120, 80], [100, 120, 80]),
        ([10, 40], [10, 30]),
        ([100, 250], [100, 250]),
        ([100, 100, 10**9], [100, 100, 300]),
        ([100, 100, 100, 10**12, 100], [100, 100, 100, 400, 100]),
        ([100, 10**12], [100, 300]),
        ([7], [7]),
        ([], []),
    ],
)
def test_no_site_counts_for_more_than_the_others(samples: list[int], counts: list[int]) -> None:
    named = {f"s{i}": n for i, n in enumerate(samples)}
    assert list(capped(named, 0.5).values()) == counts
    assert capped(named, 1.0) == named


# Bounds on how far an update moves.


def config(**other: Any) -> RunConfig:
    flat = {"optimizer": "sgd", "rounds": 10, "lr-schedule": "constant"}
    return RunConfig.from_flat(flat | {k.replace("_", "-"): v for k, v in other.items()})


def update(site: str, size: float = 0.01, samples: int = 64, name: str = "classifier.w") -> Update:
    delta = np.full((3, 4), size, dtype=np.float32)
    return Update(site=site, samples=samples, delta={name: delta, "vit.lora": delta / 10})


def judged(guard: Guard, round_: int, *updates: Update) -> tuple[list[str], dict[str, str]]:
    refused: dict[str, str] = {}
    good = guard.within(round_, updates, lambda _, site, why: refused.update({site: why}))
    return [u.site for u in good], refused


def test_an_update_far_beyond_the_median_is_refused_by_name() -> None:
    guard = Guard(config(), ("classifier",))
    good, refused = judged(guard, 1, update("a"), update("b", 0.05), update("c", 10.0))
    assert good == ["a", "b"]
    assert "'c' refused: its module moves 200 times as far" in refused["c"]
    assert "max-update-ratio=20" in refused["c"]


def test_a_small_part_cannot_hide_behind_a_large_one() -> None:
    guard = Guard(config(), ("classifier",))
    bad = Update(
        site="c",
        samples=64,
        delta=dict(update("c").delta) | {"vit.lora": np.full((3, 4), 0.1, "f4")},
    )
    _, refused = judged(guard, 1, update("a"), update("b"), bad)
    assert "its module moves 100 times" in refused["c"]


def test_two_sites_are_judged_by_the_rounds_before() -> None:
    guard = Guard(config(), ("classifier",))
    assert judged(guard, 1, update("a"), update("b"))[1] == {}
    for small_or_large in (10.0, 1e-9):
        good, refused = judged(guard, 2, update("a"), update("b", small_or_large))
        # A site that hardly moves does not make the other look far.
        assert "a" in good
        assert set(refused) == ({"b"} if small_or_large > 1 else set())


def test_nobody_is_refused_where_there_is_no_majority_or_no_bound() -> None:
    assert judged(Guard(config(), ("classifier",)), 1, update("a"), update("b", 10.0))[1] == {}
    off = Guard(config(max_update_ratio=0), ("classifier",))
    assert judged(off, 1, update("a"), update("b"), update("c", 1e3))[1] == {}


def test_adamw_cannot_move_farther_than_its_steps() -> None:
    """Also of two sites in the first round: what the optimiser can do needs no majority."""
    adam = Guard(config(optimizer="adamw", learning_rate=0.01), ("classifier",))
    # Two steps of 0.01 and 0.0005.
    good, refused = judged(adam, 1, update("a", 0.004), update("b", 10.0))
    assert good == ["a"]
    assert (
        "classifier.w moves by 10, 2 steps at the run's learning rate move at most 0.146"
        in refused["b"]
    )


def test_what_adamw_can_do_at_most_is_within_the_bound() -> None:
    """torch's own optimiser on the gradients that drive it farthest: small ones first, then ever larger."""
    import torch

    from fedsplit.federation.server.combine.guard import ADAMW_STEP

    worst = 0.0
    for growth in (1.0, 1.1, 1.5):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        adam = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0, eps=1e-30)
        for step in range(1560):
            before = weight.item()
            weight.grad = torch.full_like(weight, 1e-9 * growth ** max(0, step - 1500))
            adam.step()
            worst = max(worst, abs(weight.item() - before))
    assert 2 < worst < ADAMW_STEP


def test_weights_of_accepted_updates_are_capped() -> None:
    guard = Guard(config(), ("classifier",))
    told = [update("a"), update("b"), update("c", samples=10**9)]
    good = guard.within(1, told, lambda *_: None)
    assert [u.samples for u in good] == [64, 64, 192]
    # Where no bound binds, it is the very same update.
    same = guard.within(2, told[:2], lambda *_: None)
    assert same[0] is told[0]


# The step back.


def rows(*correct: int, of: int = 50) -> list[RoundMetrics]:
    return [
        RoundMetrics.model_validate(
            METRICS | {"site": f"s{i}", "correct_global": n, "test_samples": of}
        )
        for i, n in enumerate(correct)
    ]


def module(value: float) -> dict[str, Any]:
    return {"w": np.full(2, value, "f4")}


def test_a_module_that_most_sites_lose_by_is_undone_once() -> None:
    guard = Guard(config(), ())
    first, second, third = (Version(module(i), round=i) for i in range(3))
    assert guard.undo(first, rows(25, 25, 25), (), 3) is None
    judged(guard, 1, update("s0"), update("s1"), update("s2", 0.1))
    back = guard.undo(second, rows(10, 8, 30), (), 3)
    assert back is not None
    assert back[0] is first
    assert (
        "2 of 3 sites lost more than 10 points by the module of round 1 (50.0% to 32.0%)" in back[1]
    )
    assert "s2's update moved the farthest, 10 times" in back[1]
    # The same again is the training's own course.
    assert guard.undo(Version(first.module, round=2), rows(25, 25, 25), (), 3) is None
    assert guard.undo(third, rows(10, 8, 30), (), 3) is None


@pytest.mark.parametrize(
    ("before", "after", "of"),
    [
        ((25, 25, 25), (21, 22, 21), 50),  # less than 10 points
        ((25, 25, 25), (5, 25, 25), 50),  # one site alone
        ((4, 4, 4), (3, 3, 3), 5),  # 20 points of five samples are chance
        ((3, 3, 3), (9, 9, 9), 10),
    ],
)
def test_small_losses_are_no_harm(before: Any, after: Any, of: int) -> None:
    guard = Guard(config(), ())
    guard.undo(Version(module(0)), rows(*before, of=of), (), 3)
    assert guard.undo(Version(module(1), round=1), rows(*after, of=of), (), 3) is None


def test_no_round_is_undone_where_that_is_switched_off() -> None:
    guard = Guard(config(step_back=False), ())
    guard.undo(Version(module(0)), rows(25, 25, 25), (), 3)
    assert guard.undo(Version(module(1), round=1), rows(5, 5, 5), (), 3) is None


def test_a_module_that_most_sites_cannot_train_on_is_undone() -> None:
    guard = Guard(config(), ())
    guard.undo(Version(module(0)), rows(25, 25, 25), (), 3)
    assert guard.undo(Version(module(1), round=1), rows(25, 25), ("s2",), 3) is None
    back = guard.undo(Version(module(2), round=2), (), ("s1", "s2"), 3)
    assert back is not None
    assert (
        "2 of 3 sites could not train on the module of round 2; round 1 is gone on from" in back[1]
    )


# In a run.


def says(node: int, samples: int) -> Any:
    """A site that claims more samples than it has."""

    def tamper(at: int, message: Message, reply: Message) -> Message:
        if at != node or messages.ANSWER not in reply.content.config_records:
            return reply
        content = reply.content
        if message.metadata.group_id == "0":
            call = messages.read(content, messages.ANSWER, RollCall)
            part: Any = call.model_copy(update={"samples": samples, "test_samples": samples})
        else:
            answer = messages.read(content, messages.ANSWER, Answer)
            if answer.metrics.loss is None:
                return reply
            part = answer.model_copy(
                update={"metrics": answer.metrics.model_copy(update={"samples": samples})}
            )
        content[messages.ANSWER] = messages.write(messages.ANSWER, part)[messages.ANSWER]
        return reply

    return tamper


def adds(node: int, value: float, rounds: str) -> Any:
    """A site that adds `value` to all that it sends in these rounds."""

    def tamper(at: int, message: Message, reply: Message) -> Message:
        record = reply.content.array_records.get(DELTA) if reply.has_content() else None
        if at != node or record is None or message.metadata.group_id not in rounds:
            return reply
        moved = {name: array.numpy() + np.float32(value) for name, array in record.items()}
        reply.content[DELTA] = messages.to_arrays(moved)
        return reply

    return tamper


def test_ten_in_every_value_is_refused_and_the_run_learns(tmp_path: Path) -> None:
    wide = settings(tmp_path, cut="1,5", max_samples=240)
    with prepared(wide, simulated(3), tamper=adds(2, 10.0, "12")) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    assert {(a.site, a.rounds) for a in summary.left_out} == {("site-1", (1,)), ("site-1", (2,))}
    assert summary.accuracy_global is not None
    assert summary.accuracy_global > 0.6


def test_a_claim_of_many_samples_counts_for_little_and_is_told(tmp_path: Path) -> None:
    wide = settings(tmp_path, cut="1,5", max_samples=240, rounds=1)
    with prepared(wide, simulated(3), tamper=says(2, 10**9)) as (run, net):
        summary = run.go()
    assert any("site-1 says 1000000000 samples and counts for 1" in n for n in summary.notes)
    assert any("site-1 says 1000000000 test samples, more than all" in n for n in summary.notes)
    orders = [messages.read(m.content, messages.ORDER, Order) for m in net.sent]
    steps = [o.stream.grant.max_steps for o in orders if o.stream is not None]
    assert max(steps) < 1000
    assert summary.accuracy_global is not None
    assert summary.accuracy_global > 0.5


def test_a_harmful_round_is_undone_and_the_suspect_named(tmp_path: Path) -> None:
    """Without the bound on updates, so that the harm is done."""
    bad = settings(
        tmp_path, cut="6,6", max_samples=300, rounds=4, max_update_ratio=0,
        optimizer="sgd", learning_rate=0.5, lora_learning_rate=0.1, lr_schedule="constant",
    )  # fmt: skip
    with prepared(bad, simulated(3), tamper=adds(3, 20.0, "3")) as (run, _):
        summary = run.go()
    assert any(
        "round 3 was undone: " in n and "round 2 is gone on from; site-2's update" in n
        for n in summary.notes
    ), summary.notes
    by_round = summary.accuracy_by_round
    assert by_round[3] < by_round[2] - 0.1
    assert summary.accuracy_global is not None
    assert summary.accuracy_global > by_round[2] - 0.05


@pytest.mark.parametrize(
    "choice",
    [
        {"partition": "dirichlet:0.1", "cut": "0,6;1,5;2,4;6,6"},
        {"partition": "quantity:0.5", "cut": "1,5", "lora_ranks": "2;4;8"},
        {"partition": "dirichlet:0.1", "cut": "6,6", "optimizer": "sgd", "learning_rate": 0.5,
         "lora_learning_rate": 0.1, "classifier_init": "ridge"},
        {"partition": "dirichlet:0.1", "cut": "6,6", "accumulate": 2, "local_epochs": 3, "sync_every": 2},
    ],
    ids=["skew", "sizes", "sgd", "syncs"],
)  # fmt: skip
def test_honest_sites_are_not_refused(choice: dict[str, Any], tmp_path: Path) -> None:
    with prepared(settings(tmp_path, max_samples=500, min_sites=1, **choice), simulated(6)) as (
        run,
        _,
    ):
        summary = run.go()
    assert summary.left_out == ()
    assert not any("undone" in note for note in summary.notes)


# Before the first round.


def larger(told: dict[str, Any]) -> None:
    """Sums of the same samples with features a million times as large."""
    for name, array in told.items():
        if name.endswith("moment"):
            array[:-1] *= 1e6
            continue
        rows = int((2 * array.size) ** 0.5)
        i, j = np.triu_indices(rows)
        array *= np.where(i < rows - 1, 1e6, 1.0) * np.where(j < rows - 1, 1e6, 1.0)


def negative(told: dict[str, Any]) -> None:
    """A feature whose squares add up to less than nothing: no ridge can be solved with it."""
    told["fit/statistics.gram"][0] *= -1e6


@pytest.mark.parametrize(
    ("change", "words"),
    [(larger, "e+05 times as large as is usual"), (negative, "sums of no samples that can be")],
)
def test_sums_that_would_undo_those_of_the_others_are_refused(
    change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One array a tensor, which the server reads too, so that names lead to them here.
    monkeypatch.setattr(messages, "packed", messages.to_arrays)

    def tamper(at: int, message: Message, reply: Message) -> Message:
        record = reply.content.array_records.get(STATISTICS) if reply.has_content() else None
        if at == 2 and record is not None:
            told = {name: array.numpy().copy() for name, array in record.items()}
            change(told)
            reply.content[STATISTICS] = messages.to_arrays(told)
        return reply

    ridge = settings(tmp_path, cut="6,6", max_samples=240, rounds=0, method="closed-form")
    with prepared(ridge, simulated(3), tamper=tamper) as (run, _):
        summary = run.go()
    (left,) = summary.left_out
    assert (summary.outcome, left.site) == ("partial", "site-1")
    assert words in left.reason
    assert summary.accuracy_global is not None
    assert summary.accuracy_global > 0.7


def test_a_calibration_of_others_numbers_is_refused(tmp_path: Path) -> None:
    def forged(at: int, message: Message, reply: Message) -> Message:
        record = reply.content.config_records.get(messages.ANSWER)
        if at == 1 or record is None or '"nll"' not in str(record["json"]):
            return reply
        told = messages.read(reply.content, messages.ANSWER, Calibration)
        if at == 2:
            metrics = told.metrics.model_copy(update={"site": "site-0", "round": 1})
            told = told.model_copy(update={"metrics": metrics})
        else:
            told = told.model_copy(update={"nll": (1.7e308,) * len(told.nll)})
        reply.content[messages.ANSWER] = messages.write(messages.ANSWER, told)[messages.ANSWER]
        return reply

    ridge = settings(
        tmp_path, cut="6,6", max_samples=240, rounds=1, classifier_init="ridge", min_sites=1
    )
    with prepared(ridge, simulated(3), tamper=forged) as (run, _):
        summary = run.go()
    told = {a.site: a.reason for a in summary.left_out}
    assert "it answered for ('site-0', 1)" in told["site-1"]
    assert "losses of at most 1e+15" in told["site-2"]
    assert len([m for m in run.ledger.metrics if m.round == 1]) == 3
