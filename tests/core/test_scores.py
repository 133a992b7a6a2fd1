"""Scores as sums: they add over sites, foreign ones are capped, and files keep the names that they always had."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsplit.core.records import RoundMetrics
from fedsplit.core.scores import CLASS_SCORES, Tally, added
from tests.core.test_records import METRICS


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
