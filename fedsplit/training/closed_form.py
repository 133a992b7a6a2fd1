"""Classifiers from sums: ridge regression and class means over frozen features, exact whatever the skew.

A site adds its features into `FeatureStatistics`, the sums of all sites are added up, and the solution is that
of all samples in one place (Fed3R, arXiv 2406.01116; class means: FedNCM, arXiv 2402.01862). Then the sites report how well a few fixed
temperatures fit, and the best in sum makes the logits fit for softmax. numpy alone, but for `collect`.
Shapes: N samples, F features that enter the last linear layer, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fedsplit.core.errors import ConfigError, FederationError, UpdateError
from fedsplit.model.split import SplitModel
from fedsplit.training import pipeline
from fedsplit.training.data import Batch
from fedsplit.training.last_linear import LastInput, last_linear
from fedsplit.training.pipeline import Flow
from fedsplit.training.task import CLASSIFICATION, Task

Floats = NDArray[np.float64]
GRAM, MOMENT = "statistics.gram", "statistics.moment"
# More than what float32 on the wire rounds off, in shares of the sums' own size.
ROUNDING = 1e-3
TEMPERATURES: Floats = np.geomspace(1e-3, 1e3, 121)
"""Where the temperature is looked for: a twentieth of a decade apart, finer than accuracy can tell."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Sums over samples of features x (with a 1 appended) and of targets y: one-hot labels, or one number."""

    gram: Floats
    """Sum of x x^T, [F + 1, F + 1]; the last row holds the sum of features and the number of samples."""
    moment: Floats
    """Sum of x y^T, [F + 1, C]; the last row holds the sum of the targets: the samples of each class."""

    @classmethod
    def empty(cls, features: int, classes: int) -> FeatureStatistics:
        """No samples yet."""
        return cls(np.zeros((features + 1, features + 1)), np.zeros((features + 1, classes)))

    @property
    def features(self) -> int:
        """F."""
        return len(self.gram) - 1

    @property
    def classes(self) -> int:
        """C."""
        return int(self.moment.shape[1])

    @property
    def samples(self) -> int:
        """N."""
        return round(float(self.gram[-1, -1]))

    @property
    def counts(self) -> Floats:
        """Samples a class, [C]."""
        counts_C: Floats = self.moment[-1]
        return counts_C

    @property
    def class_sums(self) -> Floats:
        """Sum of the features of each class, [C, F]."""
        return self.moment[:-1].T

    @property
    def possible(self) -> bool:
        """Can they be of any samples? Products of vectors with themselves, summed, have no direction of negative length."""
        joint = np.block([[self.gram, self.moment], [self.moment.T, np.diag(self.counts)]])
        size = np.abs(np.diag(joint))
        scale = np.sqrt(np.maximum(size, 1e-12 * max(size.max(), 1.0)))
        try:
            np.linalg.cholesky(joint / np.outer(scale, scale) + ROUNDING * np.eye(len(joint)))
        except np.linalg.LinAlgError:
            return False
        return True

    @property
    def length(self) -> float:
        """Root mean square of a feature."""
        squares, samples = np.diag(self.gram)[:-1], float(self.gram[-1, -1])
        return math.sqrt(max(float(squares.mean()) / samples, 0.0)) if samples > 0 else 0.0

    def add(self, features_NF: ArrayLike, labels_N: ArrayLike) -> FeatureStatistics:
        """With more samples; sums are in float64. Whole labels are classes, others numbers.

        Raises UpdateError for features that are not finite.
        """
        features = np.asarray(features_NF, dtype=np.float64)
        labels = np.asarray(labels_N)
        if not np.isfinite(features).all():
            raise UpdateError("features are not finite; look for broken samples or weights")
        x = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        if labels.dtype.kind == "f":
            y = labels.astype(np.float64)[:, None]
        else:
            y = np.zeros((len(labels), self.classes))
            y[np.arange(len(labels)), labels] = 1.0
        return FeatureStatistics(self.gram + x.T @ x, self.moment + x.T @ y)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        """Of both their samples."""
        return FeatureStatistics(self.gram + other.gram, self.moment + other.moment)

    def scaled(self, factor: float) -> FeatureStatistics:
        """As if each sample were `factor` of one."""
        return FeatureStatistics(self.gram * factor, self.moment * factor)

    def arrays(self, dtype: Any = np.float32) -> dict[str, NDArray[Any]]:
        """For the wire: the upper triangle of the gram, as it is symmetric, and the moment."""
        upper = np.triu_indices(len(self.gram))
        return {GRAM: self.gram[upper].astype(dtype), MOMENT: self.moment.astype(dtype)}

    @staticmethod
    def shapes(*, features: int, classes: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `arrays`."""
        rows = features + 1
        return {GRAM: (rows * (rows + 1) // 2,), MOMENT: (rows, classes)}

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        *,
        features: int,
        classes: int,
        numbers: bool = False,
    ) -> FeatureStatistics:
        """The inverse of `arrays`; with `numbers` the targets are no classes, whose samples can be counted.

        Raises UpdateError on anything else than finite sums of these sizes.
        """
        rows = features + 1
        wanted = cls.shapes(features=features, classes=classes)
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != wanted:
            raise UpdateError(
                f"feature statistics have arrays {shapes}, {wanted} is wanted; the site has another backbone "
                f"or class list"
            )
        packed, moment = (np.asarray(arrays[n], dtype=np.float64) for n in (GRAM, MOMENT))
        if not (np.isfinite(packed).all() and np.isfinite(moment).all()):
            raise UpdateError("feature statistics are not finite; they cannot be used")
        gram = np.zeros((rows, rows))
        gram[np.triu_indices(rows)] = packed
        found = cls(gram + np.triu(gram, 1).T, moment)
        if numbers:
            return found
        if (found.counts < 0).any() or not np.isclose(found.counts.sum(), gram[-1, -1], rtol=1e-6):
            raise UpdateError(
                f"feature statistics count {found.counts.sum():g} labels and {gram[-1, -1]:g} samples; they "
                f"must be of the same samples"
            )
        if not found.possible:
            raise UpdateError(
                "feature statistics are sums of no samples that can be; look at that site"
            )
        return found


@dataclass(frozen=True, eq=False)
class Linear:
    """A classifier: logits = features @ weight.T + bias."""

    weight: NDArray[np.float32]
    """[C, F]"""
    bias: NDArray[np.float32]
    """[C]"""

    def logits(self, features_NF: ArrayLike) -> Floats:
        """[N, C], in float64."""
        features = np.asarray(features_NF, dtype=np.float64)
        return features @ self.weight.T.astype(np.float64) + self.bias

    def cooled(self, temperature: float) -> Linear:
        """With all logits divided by the temperature."""
        scale = np.float32(1 / temperature)
        return Linear(self.weight * scale, self.bias * scale)


def ridge(statistics: FeatureStatistics, alpha: float, *, bias: bool = True) -> Linear:
    """Least squares to the targets with alpha |weight|^2: scikit-learn's `Ridge(alpha, fit_intercept=bias)`.

    The bias is not regularised: features and labels are centred, which the sums allow afterwards. Without `bias` it is
    zero. Raises FederationError without a sample, ConfigError where alpha is 0 and the samples do not settle the solution.
    """
    n = _samples(statistics)
    mean_F, frequency_C = statistics.gram[-1, :-1] / n, statistics.counts / n
    gram, moment = _centred(statistics)
    if not bias:
        gram, moment = statistics.gram[:-1, :-1], statistics.moment[:-1]
    try:
        # The gram is positive definite with any alpha > 0; the jump to lstsq would hide that it is not.
        factor = np.linalg.cholesky(gram + alpha * np.eye(len(gram)))
    except np.linalg.LinAlgError as err:
        raise ConfigError(
            f"ridge-lambda={alpha:g} leaves {statistics.features} features of {statistics.samples} samples "
            f"without one solution; raise it"
        ) from err
    weight_FC = np.linalg.solve(factor.T, np.linalg.solve(factor, moment))
    bias_C = frequency_C - mean_F @ weight_FC if bias else np.zeros(statistics.classes)
    return Linear(weight_FC.T.astype(np.float32), bias_C.astype(np.float32))


def scaled_alpha(statistics: FeatureStatistics, ridge_lambda: float) -> float:
    """`ridge_lambda` in units of the features' mean variance: alpha of features scaled to variance 1.

    So the same setting does the same on a backbone whose features are ten times as large.
    """
    gram, _ = _centred(statistics)
    variance = float(np.trace(gram)) / (_samples(statistics) * statistics.features)
    return ridge_lambda * (variance or 1.0)


def class_means(statistics: FeatureStatistics) -> Linear:
    """The nearest class mean as a linear classifier: w_c = mu_c, b_c = -|mu_c|^2 / 2.

    A class that no site has gets zeros and a bias below all others', so that it is not what is left when
    nothing fits. Raises FederationError without a sample.
    """
    n = _samples(statistics)
    present = statistics.counts > 0
    means_CF = statistics.class_sums / np.maximum(statistics.counts, 1)[:, None]
    bias_C = -0.5 * (means_CF**2).sum(axis=1)
    length = float(np.trace(statistics.gram[:-1, :-1])) / n
    bias_C[~present] = bias_C[present].min() - length
    return Linear(means_CF.astype(np.float32), bias_C.astype(np.float32))


def nll_at(logits_NC: ArrayLike, labels_N: ArrayLike, temperatures: Floats) -> Floats:
    """Negative log likelihood, summed over samples, with the logits divided by each temperature."""
    logits = np.asarray(logits_NC, dtype=np.float64)
    labels = np.asarray(labels_N, dtype=np.int64)
    if not len(labels):
        return np.zeros(len(temperatures))
    # The right class at 0 keeps the numbers small whatever the logits' level.
    distance = logits - logits[np.arange(len(labels)), labels][:, None]
    return np.array([np.logaddexp.reduce(distance / t, axis=1).sum() for t in temperatures])


def best_temperature(nll: Floats, temperatures: Floats) -> float:
    """The warmest temperature that the held-out samples do not reject. Raises UpdateError for sums that are not finite.

    Few samples that are all told apart would have the logits grow without end, and a classifier that is
    certain teaches nothing. So not the minimum counts but the warmest within a likelihood ratio of it at 95%
    (Wilks; half the chi-squared quantile of one degree of freedom).
    """
    if not np.isfinite(nll).all():
        raise UpdateError("the sums of the calibration are not finite; they cannot be used")
    return float(temperatures[nll <= nll.min() + 1.92].max())


def collect(
    model: SplitModel,
    batches: Iterable[Batch],
    flow: Flow | None = None,
    task: Task = CLASSIFICATION,
) -> FeatureStatistics:
    """Sums over what enters the model's last linear layer. No gradient, several steps in flight."""
    layer = last_linear(model.part)
    statistics = FeatureStatistics.empty(layer.in_features, layer.out_features)
    for features_NF, _, labels_N in _passes(model, batches, flow or Flow(), task):
        statistics = statistics.add(features_NF, labels_N)
    return statistics


def calibration(
    model: SplitModel,
    batches: Iterable[Batch],
    temperatures: Floats = TEMPERATURES,
    flow: Flow | None = None,
) -> Floats:
    """A site's `nll_at` for the classifier that the model holds."""
    nll = np.zeros(len(temperatures))
    for _, logits_NC, labels_N in _passes(model, batches, flow or Flow()):
        nll += nll_at(logits_NC, labels_N, temperatures)
    return nll


def _passes(
    model: SplitModel, batches: Iterable[Batch], flow: Flow, task: Task = CLASSIFICATION
) -> Iterable[Any]:
    """(features, logits, targets) of each batch."""
    with torch.no_grad(), LastInput(model.part) as seen:
        for batch, z in pipeline.ahead(model, batches, flow):
            logits = pipeline.tail(model, z, batch.mask, flow.precision)
            yield seen.features.numpy(), logits.numpy(), task.targets(batch.labels).numpy()


def _samples(statistics: FeatureStatistics) -> float:
    if statistics.samples < 1:
        raise FederationError(
            "the sites' feature statistics hold no sample, so there is no classifier to be made of them"
        )
    return float(statistics.gram[-1, -1])


def _centred(statistics: FeatureStatistics) -> tuple[Floats, Floats]:
    """Gram [F, F] and moment [F, C] of features and labels with their means taken off."""
    n = _samples(statistics)
    sum_F, counts_C = statistics.gram[-1, :-1], statistics.counts
    gram = statistics.gram[:-1, :-1] - np.outer(sum_F, sum_F) / n
    return gram, statistics.moment[:-1] - np.outer(sum_F, counts_C) / n
