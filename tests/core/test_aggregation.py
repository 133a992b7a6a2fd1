"""Averaging by numbers worked out by hand, and every reason to refuse a site's update."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsplit.core.aggregation import (
    MAX_ABSOLUTE,
    Update,
    aggregate,
    check_update,
    sites_needed,
)
from fedsplit.core.errors import FederationError, UpdateError


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


MODULE = {
    "low": f32(1, 1),
    "high": f32(2, 2),
    "server": f32(3),
    "scalar": np.float32(4).reshape(()),
}
# Two sites with different cuts: "low" is trained by both, "high" by the second, "server" by nobody.
FIRST = Update(site="a", samples=10, delta={"low": f32(1, -2)})
SECOND = Update(site="b", samples=30, delta={"low": f32(3, 2), "high": f32(-1, 0.5)})


def test_each_tensor_is_averaged_over_the_sites_that_trained_it() -> None:
    merged = aggregate(MODULE, [FIRST, SECOND])
    # low: 1 + (10 * 1 + 30 * 3) / 40 and 1 + (10 * -2 + 30 * 2) / 40
    assert merged["low"].tolist() == [3.5, 2.0]
    # high: the second site alone, so its samples cancel out
    assert merged["high"].tolist() == [1.0, 2.5]
    assert merged["server"].tolist() == [3.0]
    assert set(merged) == set(MODULE)
    assert all(value.dtype == np.float32 for value in merged.values())


def test_inputs_are_left_alone() -> None:
    before = {name: value.copy() for name, value in MODULE.items()}
    aggregate(MODULE, [FIRST, SECOND])
    assert all(np.array_equal(before[name], MODULE[name]) for name in MODULE)


def test_nothing_to_aggregate_is_an_error() -> None:
    with pytest.raises(FederationError, match="no useful update"):
        aggregate(MODULE, [])


@pytest.mark.parametrize("samples", [0, -3])
def test_a_site_without_samples_is_an_error_not_a_division_by_zero(samples: int) -> None:
    empty = Update(site="b", samples=samples, delta=SECOND.delta)
    with pytest.raises(
        FederationError, match=r"site 'b' counts for no sample, at least 1 is wanted"
    ):
        aggregate(MODULE, [FIRST, empty])


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        ("mean", 1),
        ("trimmed-mean", 5),
        ("median", 5),
        ("krum", 7),
        ("multi-krum", 7),
        ("bulyan", 11),
    ],
)
def test_sites_that_a_robust_rule_needs_for_two_hostile_ones(rule: str, needed: int) -> None:
    assert sites_needed(rule, 2) == needed


def test_the_order_of_the_sites_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    module = {"w": rng.standard_normal((7, 5)).astype(np.float32)}
    updates = [
        Update(
            site=f"site-{i}",
            samples=int(rng.integers(1, 10_000)),
            delta={"w": (rng.standard_normal((7, 5)) * 10.0 ** (i - 2)).astype(np.float32)},
        )
        for i in range(4)
    ]
    results = {aggregate(module, order)["w"].tobytes() for order in itertools.permutations(updates)}
    assert len(results) == 1


values = st.floats(-1e4, 1e4, width=32)
arrays = hnp.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(1, 3)), elements=values)


@given(arrays, st.data(), st.integers(1, 2**40))
def test_one_sites_update_is_added_whole(
    value: np.ndarray, data: st.DataObject, samples: int
) -> None:
    delta = data.draw(hnp.arrays(np.float32, value.shape, elements=values))
    merged = aggregate({"w": value}, [Update(site="a", samples=samples, delta={"w": delta})])["w"]
    exact = value.astype(np.float64) + delta
    # float64 division by the samples rounds once more; then one rounding to float32.
    np.testing.assert_allclose(merged, exact.astype(np.float32), rtol=2e-7, atol=1e-12)


@given(arrays, st.integers(1, 1000), st.integers(1, 1000))
def test_sites_that_agree_are_followed(delta: np.ndarray, first: int, second: int) -> None:
    zero = np.zeros_like(delta)
    updates = [
        Update(site=name, samples=n, delta={"w": delta})
        for name, n in {"a": first, "b": second}.items()
    ]
    merged = aggregate({"w": zero}, updates)["w"]
    np.testing.assert_allclose(merged, delta, rtol=1e-6)


def check(delta: dict[str, np.ndarray], *, samples: int = 5, told: int = 5) -> None:
    update = Update(site="press-3", samples=samples, delta=delta)
    check_update(update, module=MODULE, trained={"low", "high"}, samples=told)


def good() -> dict[str, np.ndarray]:
    return {"low": f32(0, 1), "high": f32(MAX_ABSOLUTE, -MAX_ABSOLUTE)}


def test_a_good_update_passes() -> None:
    check(good())
    check_update(
        Update(site="s", samples=1, delta={"scalar": np.float32(1).reshape(())}),
        module=MODULE,
        trained={"scalar"},
        samples=1,
    )


def test_shapes_are_those_that_the_site_received() -> None:
    """A site of a lower rank is held to its own shapes, and may not send the run's."""
    name = "q.lora_A.weight"
    received = {name: np.zeros((2, 3), dtype=np.float32)}

    def sends(rank: int) -> None:
        delta = {name: np.ones((rank, 3), dtype=np.float32)}
        update = Update(site="s", samples=1, delta=delta)
        check_update(update, module=received, trained={name}, samples=1)

    sends(2)
    with pytest.raises(UpdateError, match=r"has shape \(4, 3\), \(2, 3\) is wanted"):
        sends(4)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.zeros(2, dtype=np.float64), "is float64, float32 is wanted"),
        (np.zeros(2, dtype=np.float16), "is float16, float32 is wanted"),
        (np.zeros(2, dtype=np.int32), "is int32, float32 is wanted"),
        (np.zeros(2, dtype=">f4"), "is >f4, float32 is wanted"),
        (np.array(["a", "b"]), "is <U1, float32 is wanted"),
        (np.array([None, None]), "is object, float32 is wanted"),
        (f32(1), r"has shape \(1,\), \(2,\) is wanted"),
        (np.float32(1).reshape(()), r"has shape \(\), \(2,\) is wanted"),
        (np.zeros((1, 2), dtype=np.float32), r"has shape \(1, 2\), \(2,\) is wanted"),
        (np.zeros((2, 1), dtype=np.float32), r"has shape \(2, 1\), \(2,\) is wanted"),
        (np.zeros(0, dtype=np.float32), r"has shape \(0,\), \(2,\) is wanted"),
        (f32(0, np.nan), "holds NaN or infinity; lower the learning rate"),
        (f32(np.inf, 0), "holds NaN or infinity"),
        (f32(0, -np.inf), "holds NaN or infinity"),
        (f32(0, -1.01e4), "moves by more than 10000"),
        (f32(3e38, 0), "moves by more than 10000"),
    ],
)
def test_a_bad_tensor_is_refused_by_site_and_name(value: np.ndarray, said: str) -> None:
    with pytest.raises(UpdateError, match=rf"update of site 'press-3' refused: low {said}"):
        check(good() | {"low": value})


def test_names_must_be_those_that_were_asked_for() -> None:
    with pytest.raises(UpdateError, match=r"'press-3' refused: 1 tensors it was not to .*server"):
        check(good() | {"server": f32(0)})
    with pytest.raises(UpdateError, match=r"'press-3' refused: 1 tensors are missing, e\.g\. high"):
        check({"low": f32(0, 0)})
    with pytest.raises(UpdateError, match=r"2 tensors are missing"):
        check({})


def test_a_long_name_is_not_repeated_in_full() -> None:
    with pytest.raises(UpdateError) as caught:
        check(good() | {"x" * 100_000: f32(0)})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("samples", "told"), [(6, 5), (0, 0), (-3, -3), (-5, 5), (10**30, 5)])
def test_samples_must_be_those_of_the_roll_call(samples: int, told: int) -> None:
    with pytest.raises(UpdateError, match=rf"'press-3' .*says {samples} samples.* said {told}"):
        check(good(), samples=samples, told=told)


def test_many_faults_are_counted() -> None:
    bad = {"low": f32(np.nan, 0), "high": np.zeros(2), "server": f32(0)}
    with pytest.raises(UpdateError, match=r"server; .*; .*; and 1 more$"):
        check(bad, samples=6)
