"""Verdicts on a module's answers: against scikit-learn where it has the number, and what a bound promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from fedsplit.core.errors import ConfigError, DataError
from fedsplit.predict.judge import compare, compare_numbers, judge_classes, judge_numbers
from fedsplit.predict.judge.ask import asking
from fedsplit.predict.judge.judged import Samples, judge
from fedsplit.predict.predictor import load_predictor

CLASSES = ("crack", "ok", "汚れ", "never seen")


def answers(n: int, *, seed: int = 0, skill: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [n, 4] and labels [n], none of them of the last class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    logits = rng.normal(size=(n, 4))
    logits[np.arange(n), labels] += skill
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True), labels


def test_a_verdict_has_scikit_learns_numbers() -> None:
    shares, labels = answers(500)
    found = judge_classes(shares, labels, CLASSES)
    said = shares.argmax(axis=1)
    assert found.accuracy == metrics.accuracy_score(labels, said)
    np.testing.assert_array_equal(
        found.confusion, metrics.confusion_matrix(labels, said, labels=range(4))
    )
    precision, recall, _, support = metrics.precision_recall_fscore_support(
        labels, said, labels=range(4), zero_division=np.nan
    )
    for i, one in enumerate(found.classes):
        assert one.samples == support[i]
        assert one.precision == pytest.approx(precision[i])
        assert one.recall == (None if i == 3 else pytest.approx(recall[i]))
    assert found.recall["汚れ"] == pytest.approx(recall[2])
    assert found.mean_recall == pytest.approx(np.nanmean(recall))
    assert sum(one.samples for one in found.bins) == 500
    assert found.coverage[-1] == (1.0, pytest.approx(1 - found.accuracy))
    assert found.coverage[0][1] <= found.coverage[-1][1]


def test_calibration_of_a_module_that_is_too_sure() -> None:
    """90 % sure and half of the time right: the error is 0.4, whatever the bins."""
    shares = np.tile([0.9, 0.1], (100, 1))
    found = judge_classes(shares, np.arange(100) % 2, ("a", "b"))
    assert found.calibration_error == pytest.approx(0.4)
    (one,) = found.bins
    assert (one.samples, one.accuracy) == (100, 0.5)
    assert one.low < one.confidence <= one.high


def test_a_threshold_keeps_its_promise_on_later_samples() -> None:
    """Chosen on 2,000 answers at 5 % risk: on many later ones at most 1 of 20 choices may be above it."""
    rng = np.random.default_rng(1)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        sure = rng.uniform(0.3, 1, n)
        return sure, rng.uniform(size=n) < sure**0.15

    later, right = drawn(200_000)
    broken = chosen = 0
    for _ in range(200):
        found = asking(*drawn(2000), risk=0.05)
        if found.threshold is not None:
            assert found.bound is not None
            assert found.bound <= 0.05
            chosen += 1
            broken += bool((~right[later >= found.threshold]).mean() > 0.05)
    assert chosen > 20
    assert broken <= 0.05 * 200


def test_when_to_ask_always_and_never() -> None:
    sure = np.linspace(0.5, 1, 50)
    assert (
        asking(sure, np.ones(50, bool), 0.01).threshold is None
    )  # 50 right ones do not prove 99 %
    all_right = asking(np.linspace(0.5, 1, 2000), np.ones(2000, bool), 0.01)
    assert (all_right.threshold, all_right.answered) == (0.5, 1.0)
    assert asking(sure, np.zeros(50, bool), 0.2).threshold is None
    assert asking(np.array([]), np.array([], bool), 0.2).threshold is None
    alike = asking(np.full(500, 0.7), np.ones(500, bool), 0.05)
    assert (alike.threshold, alike.answered) == (0.7, 1.0)


def test_two_modules_on_the_same_samples() -> None:
    labels = np.array([0] * 60 + [1] * 40)
    this, other = labels.copy(), labels.copy()
    this[:5] = 1
    other[3:20] = 1
    found = compare(this, other, labels)
    assert (found.this_only, found.other_only) == (15, 3)
    assert found.difference == pytest.approx(0.12)
    assert found.told_apart
    assert found.changed == (0, 1, 2, *range(5, 20))
    same = compare(this, this, labels)
    assert (same.p, same.difference, same.changed) == (1.0, 0.0, ())
    assert not same.told_apart


def test_numbers() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(50, 10, 300)
    near, far = labels + rng.normal(0.5, 1, 300), labels + rng.normal(0, 5, 300)
    found = judge_numbers(near, labels)
    assert found.mae == pytest.approx(metrics.mean_absolute_error(labels, near))
    assert found.rmse == pytest.approx(metrics.root_mean_squared_error(labels, near))
    assert found.r2 == pytest.approx(metrics.r2_score(labels, near))
    assert found.bias == pytest.approx(np.mean(near - labels))
    assert judge_numbers(near[:1], labels[:1]).r2 is None
    against = compare_numbers(near, far, labels)
    assert against.told_apart
    assert against.difference > 0 > compare_numbers(far, near, labels).difference


def test_a_module_on_its_own_source(trained_image_module: Path) -> None:
    predictor = load_predictor(trained_image_module)
    whole = judge(predictor, Samples("digits"))
    assert whole.verdict.samples == 1797
    assert "not known here" in whole.notes[-1]
    test = judge(predictor, Samples("digits", test_alone=True), against=predictor)
    assert 300 < test.verdict.samples < 400
    assert test.against is not None
    assert test.against[1].p == 1.0
    answered = test.answers.astype(int)
    assert set(test.wrong) == set(np.flatnonzero(answered != test.examples.labels))
    assert list(test.sure[list(test.wrong)]) == sorted(test.sure[list(test.wrong)], reverse=True)


def test_samples_that_cannot_be_judged(
    trained_image_module: Path, trained_text_module: Path, tmp_path: Path
) -> None:
    images, texts = load_predictor(trained_image_module), load_predictor(trained_text_module)
    table = tmp_path / "texts.csv"
    table.write_text("text,label\nthe belt,belt\nthe valve,valve\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"label 'valve' is not one of the task's classes: 'belt', 'pump'"
    ):
        judge(texts, Samples(f"csv:{table}"))
    with pytest.raises(ConfigError, match=r"different questions: .* says 0, 1, .* says belt, pump"):
        judge(images, Samples("digits"), against=texts)
    table.write_text("text,label\nthe belt,belt\nold belt,belt\n", encoding="utf-8")
    found = judge(texts, Samples(f"csv:{table}"))
    assert "there is no sample of pump: nothing is said" in found.notes[0]
    table.write_text("text,label\nthe belt,1\nold belt,2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"are texts, the module .* reads images"):
        judge(images, Samples(f"csv:{table}"))
