"""Scores as sums: they add over sites, foreign ones are capped, and files keep the names that they always had."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsplit.core.errors import ConfigError
from fedsplit.core.records import RoundMetrics, Summary
from fedsplit.core.scores import CLASS_SCORES, NUMBER_SCORES, Scale, Spread, Tally, added, agreed
from tests.core.test_records import METRICS
from tests.report import samples


def right(correct: float, of: int) -> Tally:
    return Tally(sums={"correct": correct}, samples=of)


def test_tests_of_sites_add_up_to_the_test_of_all() -> None:
    assert added([right(1, 4), right(8, 8), CLASS_SCORES.nothing]) == right(9, 12)
    assert CLASS_SCORES.scores(right(9, 12)) == {"accuracy": 0.75}
    assert CLASS_SCORES.scores(CLASS_SCORES.nothing) is None
    assert CLASS_SCORES.scores(added([])) is None


@pytest.mark.parametrize(
    "test",
    [right(5, 4), right(-1, 4), right(0.5, 4), Tally(sums={}, samples=4), Tally(sums={"sq": 1}, samples=4)],
)  # fmt: skip
def test_what_no_test_comes_to_is_seen(test: Tally) -> None:
    assert not CLASS_SCORES.possible(test)
    assert CLASS_SCORES.possible(right(4, 4))


@pytest.mark.parametrize(
    "sums",
    [{"a": math.inf}, {"a": math.nan}, {"a": 1e200}, {"a" * 33: 1}, {"": 1}, {str(i): 1 for i in range(9)}],
)  # fmt: skip
def test_foreign_sums_are_capped(sums: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Tally(sums=sums, samples=1)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["correct_global", "correct_personal", "sums_global", "sums_personal"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
            max_leaves=6,
        ),
    )
)
def test_any_metrics_are_read_or_refused(change: dict[str, Any]) -> None:
    try:
        metrics = RoundMetrics.model_validate(METRICS | change)
    except ValidationError:
        return
    again = RoundMetrics.model_validate_json(metrics.model_dump_json())
    assert again.tested == metrics.tested or not CLASS_SCORES.possible(metrics.tested)


def test_the_files_of_a_task_with_classes_have_their_own_names() -> None:
    metrics = RoundMetrics.model_validate(METRICS | {"correct_personal": 3})
    assert metrics.sums_global == {"correct": 2}
    assert metrics.sums_personal == {"correct": 3}
    told = json.loads(metrics.model_dump_json())
    assert (told["correct_global"], told["correct_personal"]) == (2, 3)
    assert not {"sums_global", "sums_personal"} & told.keys()


def test_the_summary_of_classes_has_accuracies_and_no_scores() -> None:
    summary = samples.summary(samples.metrics(), accuracy_local_only=None)
    assert summary.scores == {"accuracy": 0.9}
    assert summary.scores_by_round[0] == {"accuracy": summary.accuracy_by_round[0]}
    assert summary.scores_local_only is None
    assert summary.sites[0].scores_before == {"accuracy": 0.3}
    told = json.loads(summary.model_dump_json())
    names = {*told, *told["sites"][0]}
    assert {"accuracy_global", "accuracy_local_only", "accuracy_before", "accuracy"} <= names
    assert not [name for name in names if name.startswith(("scores", "target"))]
    assert Summary.model_validate(told) == summary


# Numbers.


def of_numbers(said: list[float], told: list[float], mean: float = 0.0) -> Tally:
    errors, centred = [a - b for a, b in zip(said, told, strict=True)], [b - mean for b in told]
    sums = {
        "abs": sum(map(abs, errors)), "sq": sum(e * e for e in errors), "y": sum(centred),
        "yy": sum(c * c for c in centred),
    }  # fmt: skip
    return Tally(sums=sums, samples=len(told))


@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_scores_of_numbers_are_those_of_all_samples_in_one_place(mean: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    told = rng.normal(mean, 3.0, 50)
    said = told + rng.normal(0, 1.0, 50)
    places = (slice(0, 7), slice(7, 30), slice(30, 50))
    found = NUMBER_SCORES.scores(
        added(of_numbers(said[p].tolist(), told[p].tolist(), mean) for p in places)
    )
    assert found is not None
    assert list(found) == ["mae", "rmse", "r2"]
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(told, said))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(told, said))
    assert found["r2"] == pytest.approx(metrics.r2_score(told, said))


def test_equal_numbers_have_no_r2() -> None:
    assert NUMBER_SCORES.scores(of_numbers([1.0, 3.0], [2.1, 2.1], 1.3)) is not None
    assert "r2" not in (NUMBER_SCORES.scores(of_numbers([1.0, 3.0], [2.1, 2.1], 1.3)) or {})


@pytest.mark.parametrize(
    "change", [{"sq": -1.0}, {"abs": -1.0}, {"abs": 9.0}, {"y": 1e6}, {"yy": 0.0}, {"correct": 1.0}]
)
def test_sums_of_numbers_that_no_test_comes_to(change: dict[str, float]) -> None:
    good = of_numbers([1.0, 2.0, 4.0], [1.5, 2.0, 2.0])
    assert NUMBER_SCORES.possible(good)
    assert not NUMBER_SCORES.possible(Tally(sums=good.sums | change, samples=3))


def test_a_site_has_lost_where_its_error_grew_by_more_than_chance_explains() -> None:
    told = list(np.linspace(0, 10, 40))
    good, worse, same = (of_numbers([t + by for t in told], told, 5.0) for by in (0.5, 4.0, 0.6))
    assert NUMBER_SCORES.lost(good, worse)
    assert not NUMBER_SCORES.lost(good, same)
    assert not NUMBER_SCORES.lost(worse, good)
    # However few the samples are: no chance explains an explosion.
    few = of_numbers([1.0, 2.0], [1.1, 2.2]), of_numbers([1e9, 2.0], [1.1, 2.2])
    assert NUMBER_SCORES.lost(*few)


def test_mean_and_deviation_of_all_sites_are_those_of_all_numbers() -> None:
    numbers = np.random.default_rng(1).normal(1e8, 2.0, 60)
    parts = (numbers[:5], numbers[5:40] + 3, numbers[40:])
    spreads = [(Spread(mean=float(p.mean()), deviation=float(p.std())), len(p)) for p in parts]
    scale, pooled = agreed(spreads), np.concatenate(parts)
    assert scale.mean == pytest.approx(pooled.mean())
    assert scale.deviation == pytest.approx(pooled.std())
    with pytest.raises(ConfigError, match="one number, 4, so there is nothing to learn"):
        agreed([(Spread(mean=4.0, deviation=0.0), 3)])


def test_files_of_numbers_have_scores_and_no_accuracy() -> None:
    sums = of_numbers([1.0, 2.0], [1.5, 2.0]).sums
    plain = {k: v for k, v in METRICS.items() if k != "correct_global"}
    metrics = RoundMetrics.model_validate(plain | {"sums_global": sums, "test_samples": 2})
    assert metrics.scoring is NUMBER_SCORES
    told = json.loads(metrics.model_dump_json())
    assert told["sums_global"] == sums
    assert told["correct_global"] is None
    assert RoundMetrics.model_validate(told) == metrics


@pytest.mark.parametrize(
    "raw",
    [{"mean": math.nan}, {"mean": math.inf}, {"mean": 2e30}, {"deviation": -1.0}, {"deviation": math.nan},
     {"deviation": 1e31}, {"mean": "x"}, {"more": 1}],
)  # fmt: skip
def test_what_a_site_says_of_its_numbers_is_bounded(raw: dict[str, Any]) -> None:
    good = {"mean": 1.0, "deviation": 0.0}
    assert Spread.model_validate(good).deviation == 0
    with pytest.raises(ValidationError):
        Spread.model_validate(good | raw)
    with pytest.raises(ValidationError):
        Scale.model_validate(good)
