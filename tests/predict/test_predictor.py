"""A module in use: found, loaded on its backbone, and its answers are those of the run's own tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedsplit.predict.predictor import load_predictor
from fedsplit.training.data import load_source


def test_an_image_module_of_a_run_answers(trained_image_module: Path) -> None:
    predictor = load_predictor(trained_image_module)
    assert (predictor.kind, predictor.found.task) == ("image", "digits")
    assert predictor.classes == tuple("0123456789")
    examples = load_source("digits", site="here", max_samples=100)
    outputs = predictor.over(examples, batch_size=32)
    assert outputs.shape == (100, 10)
    shares = predictor.probabilities(outputs)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (shares.argmax(axis=1) == examples.labels).mean() > 0.7
    one_by_one = [predictor.prepare(examples.image(i)) for i in range(32)]
    assert np.array_equal(predictor.outputs(one_by_one), outputs[:32])


def test_a_text_module_of_a_run_answers(trained_text_module: Path) -> None:
    predictor = load_predictor(trained_text_module / "module")
    assert (predictor.kind, predictor.found.task) == ("text", "orders")
    shares = predictor.predict("pump leaks oil")
    assert next(iter(shares)) == "pump"
    assert json.loads((trained_text_module / "summary.json").read_text())["outcome"] == "complete"
