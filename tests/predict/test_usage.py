"""Counts of answers a day: several at once, over midnight, damaged files, a disk that takes nothing."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from fedsplit.predict import usage
from fedsplit.predict.usage import Sums, Usage, day_of, used

MODULE, OTHER = "ab" * 32, "cd" * 32
NOON = 1_764_331_200.0  # 2025-11-28 12:00 UTC


def test_answers_add_up_over_processes_and_threads(tmp_path: Path) -> None:
    def answer() -> None:
        with Usage(tmp_path, MODULE, now=lambda: NOON) as one:
            for _ in range(50):
                one.add(["good", "傷"], [0.5, 1.0])

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Usage(tmp_path, OTHER, now=lambda: NOON) as other:
        other.add(["good"], [0.25])
    assert used(tmp_path, "2025-11-28") == {
        MODULE: Sums(samples=400, confidence=300.0, classes={"good": 200, "傷": 200}),
        OTHER: Sums(samples=1, confidence=0.25, classes={"good": 1}),
    }


def test_each_day_has_its_own_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "DAYS_KEPT", 2)
    at = [NOON]
    with Usage(tmp_path, MODULE, now=lambda: at[0]) as one:
        for day in range(4):
            at[0] = NOON + day * 86_400
            one.add(["good"] * (day + 1), [1.0] * (day + 1))
            one.flush()
    assert [used(tmp_path, day_of(NOON + d * 86_400)).get(MODULE, Sums()).samples for d in range(4)] == [0, 0, 3, 4]  # fmt: skip


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "usage").mkdir()
    (tmp_path / "usage" / "2025-11-28.json").write_text('{"modules": {"x": {"samples": -4}}}')
    assert used(tmp_path, "2025-11-28") == {}
    with Usage(tmp_path, MODULE, now=lambda: NOON) as one:
        one.add(["good"], [0.5])
    assert used(tmp_path, "2025-11-28")[MODULE].samples == 1


def test_counts_that_cannot_be_kept_never_cost_an_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage").write_text("in the way")
    with caplog.at_level(logging.WARNING), Usage(tmp_path, MODULE) as one:
        one.add(["good"], [0.5])
        one.flush()
        one.add(["good"], [0.5])
    assert [r.message for r in caplog.records if "cannot be kept" in r.message] != []
    assert len(caplog.records) == 1
