"""What a run's last test keeps of classes: which was taken for which, a site and in all, and the recall that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fedsplit.core.records import RoundMetrics
from fedsplit.core.scores import MAX_CONFUSED, Tally, fits, recall_of, together


def test_the_last_test_is_kept_and_adds_over_sites(trained_image_module: Path) -> None:
    summary = json.loads((trained_image_module / "summary.json").read_text(encoding="utf-8"))
    text = (trained_image_module / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    last = summary["rounds_done"] + 1
    assert {line["round"] for line in lines if "confusion" in line} == {last}
    tested = [line for line in lines if line["round"] == last]
    for line in tested:
        counts = np.array(line["confusion"])
        assert counts.sum() == line["test_samples"]
        assert np.trace(counts) == line["correct_global"]
    whole = np.sum([line["confusion"] for line in tested], axis=0)
    assert summary["confusion"] == whole.tolist()
    assert np.trace(whole) / whole.sum() == pytest.approx(summary["accuracy_global"])
    classes = json.loads((trained_image_module / "config.json").read_text())["classes"]
    assert list(summary["recall"]) == classes
    assert summary["recall"]["0"] == pytest.approx(whole[0, 0] / whole[0].sum())
    by_site = {site["name"]: site["confusion"] for site in summary["sites"]}
    assert by_site == {line["site"]: line["confusion"] for line in tested}


def test_a_matrix_that_contradicts_the_test_does_not_fit() -> None:
    test = Tally(sums={"correct": 3.0}, samples=4)
    assert fits(((2, 1), (0, 1)), test, 2)
    assert not fits(((2, 0), (0, 1)), test, 2)  # three samples
    assert not fits(((1, 2), (0, 1)), test, 2)  # two right
    assert not fits(((2, 1), (0, 1)), test, 3)
    assert not fits(((2, 1), (1,)), test, 2)
    assert together([]) is None
    assert together([((1, 0), (0, 0)), ((1, 2), (0, 4))]) == ((2, 2), (0, 4))
    assert recall_of(((1, 1), (0, 0)), ("a", "b")) == {"a": 0.5, "b": None}
    assert recall_of(None, ("a",)) is None


def test_a_foreign_matrix_is_bounded(trained_image_module: Path) -> None:
    text = (trained_image_module / "metrics.jsonl").read_text(encoding="utf-8")
    line = json.loads(text.splitlines()[-1])
    for odd in ([[0] * (MAX_CONFUSED + 1)], [[0]] * (MAX_CONFUSED + 1), [[-1]], [[10**13]]):
        with pytest.raises(ValidationError):
            RoundMetrics.model_validate(line | {"confusion": odd})
