"""Directions from seeds, and what losses along them say of a gradient."""

from __future__ import annotations

import numpy as np
import pytest

from fedsplit.core.directions import coefficients, dimension, direction, estimate, points

GOLDEN = (-0.4719041, 0.7295278, 0.7045852)
SHAPES = {"b": (3, 4), "a": (5,), "scalar": ()}


def test_a_direction_is_its_seed_step_and_query() -> None:
    first = direction(1, 2, 3, SHAPES)
    assert {n: v.shape for n, v in first.items()} == SHAPES
    assert all(v.dtype == np.float32 for v in first.values())
    for name, value in direction(1, 2, 3, SHAPES).items():
        np.testing.assert_array_equal(value, first[name])
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2), (2, 1, 3)):
        assert not np.array_equal(direction(*other, SHAPES)["b"], first["b"])
    assert not np.array_equal(first["b"].ravel()[:5], first["a"])


def test_a_tensors_stream_does_not_depend_on_the_others() -> None:
    alone = direction(1, 2, 3, {"a": (5,)})["a"]
    np.testing.assert_array_equal(direction(1, 2, 3, SHAPES)["a"], alone)
    backwards = dict(reversed(SHAPES.items()))
    for kind in ("gaussian", "sphere"):
        one, two = direction(1, 2, 3, SHAPES, kind), direction(1, 2, 3, backwards, kind)
        for name in SHAPES:
            np.testing.assert_array_equal(one[name], two[name])


def test_a_sphere_is_of_length_one_over_all_tensors() -> None:
    found = direction(1, 2, 3, SHAPES, "sphere")
    assert sum(float((v**2).sum()) for v in found.values()) == pytest.approx(1.0, rel=1e-6)
    plain = direction(1, 2, 3, SHAPES)
    ratios = np.concatenate([(found[n] / plain[n]).ravel() for n in SHAPES])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)


def test_these_very_numbers() -> None:
    """Both sides make directions anew, so what a seed means must not change unnoticed."""
    found = direction(7, 0, 1, {"w": (3,)})["w"]
    np.testing.assert_allclose(found, GOLDEN, rtol=1e-6)


def test_gaussian_moments() -> None:
    values = direction(5, 0, 0, {"w": (200_000,)})["w"]
    assert abs(float(values.mean())) < 0.01
    assert float(values.std()) == pytest.approx(1.0, abs=0.01)


def test_points() -> None:
    assert points("forward", 2) == ((0, 0.0), (0, 1.0), (1, 1.0))
    assert points("central", 2) == ((0, 1.0), (0, -1.0), (1, 1.0), (1, -1.0))
    assert points("one-point", 1) == ((0, 1.0),)
    assert dimension(SHAPES) == 18


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
@pytest.mark.parametrize("estimator", ["forward", "central"])
def test_a_linear_function_gives_its_slope_along_each_direction(estimator: str, kind: str) -> None:
    slope = direction(99, 0, 0, SHAPES)
    us = [direction(1, 0, j, SHAPES, kind) for j in range(3)]
    along = [sum(float((u[n] * slope[n]).sum()) for n in SHAPES) for u in us]
    losses = [4.0 + 0.5 * factor * along[j] for j, factor in points(estimator, 3)]
    got = coefficients(estimator, losses, epsilon=0.5, dim=18, kind=kind)
    np.testing.assert_allclose(got, np.array(along) * (18 if kind == "sphere" else 1))


def test_one_point() -> None:
    np.testing.assert_allclose(coefficients("one-point", [3.0], epsilon=0.1, dim=2), [30.0])


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
def test_the_estimate_is_unbiased(kind: str) -> None:
    slope, q = direction(99, 0, 0, SHAPES), 1_500
    along = []
    for j in range(q):
        u = direction(1, 0, j, SHAPES, kind)
        along.append(sum(float((u[n] * slope[n]).sum()) for n in SHAPES))
    factor = 18 if kind == "sphere" else 1
    got = estimate([factor * a for a in along], seed=1, step=0, shapes=SHAPES, kind=kind)
    for name, value in got.items():
        np.testing.assert_allclose(value, slope[name], atol=0.45)


def test_small_differences_of_large_losses_survive() -> None:
    losses = np.array([1000.0, 1000.0 + 2**-13], np.float32)
    got = coefficients("forward", losses, epsilon=1e-3, dim=1)
    np.testing.assert_allclose(got, [2**-13 / 1e-3])
