"""Regression: loss, sums and predictions in the numbers' own unit; ridge over sites is ridge of all in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsplit.core.scores import NUMBER_SCORES, Scale, Tally
from fedsplit.training.closed_form import FeatureStatistics, ridge
from fedsplit.training.task import Regression
from tests.training.small import settings

TASK = Regression(Scale(mean=100.0, deviation=20.0))
OUTPUTS = torch.tensor([[0.0], [1.0], [-2.0]])
LABELS = torch.tensor([100.0, 110.0, 70.0], dtype=torch.float64)


def test_the_loss_is_of_outputs_on_the_scale_of_all_sites() -> None:
    squared, huber = (TASK.loss(settings(loss=kind)) for kind in ("squared", "huber"))
    assert float(squared(OUTPUTS, LABELS)) == pytest.approx((0 + 0.5**2 + 0.5**2) / 3)
    # Beyond one deviation it grows in a straight line.
    far = torch.tensor([[5.0]]), torch.tensor([100.0], dtype=torch.float64)
    assert float(squared(*far)) == pytest.approx(25.0)
    assert float(huber(*far)) == pytest.approx(4.5)


def test_a_test_is_in_the_numbers_own_unit() -> None:
    sums = TASK.sums(OUTPUTS, LABELS)
    assert sums == pytest.approx({"abs": 20.0, "sq": 200.0, "y": -20.0, "yy": 1000.0})
    assert NUMBER_SCORES.possible(Tally(sums=sums, samples=3))
    assert TASK.prediction(OUTPUTS[1], ("number",)) == {"number": 120.0}
    assert TASK.errors(OUTPUTS, LABELS).tolist() == pytest.approx([0.0, 0.5, 0.5])


def test_ridge_of_the_sites_sums_is_that_of_all_samples() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 5)), rng.normal(100, 20, 60)
    total = FeatureStatistics.empty(5, 1)
    for place in (slice(0, 11), slice(11, 60)):
        targets = TASK.targets(torch.from_numpy(y[place])).numpy()
        mine = FeatureStatistics.empty(5, 1).add(x[place], targets)
        total += FeatureStatistics.of(mine.arrays(), features=5, classes=1, numbers=True)
    found = ridge(total, 3.0)
    pooled = linear_model.Ridge(3.0).fit(x, y)
    said = found.logits(x)[:, 0] * TASK.scale.deviation + TASK.scale.mean
    np.testing.assert_allclose(said, pooled.predict(x), atol=1e-3)
