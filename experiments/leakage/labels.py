"""Attacks on labels. None knows a label; matching clusters to classes is the referee's work, not the attacker's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from fedsplit.core.encoder import Array

Labels = NDArray[np.int64]
_COMPONENTS = 64
_SHUFFLES = 5


def clustering(rows: Array, labels: Labels) -> tuple[float, float]:
    """Share of samples whose k-means cluster is their class, clusters matched to classes at best; and by chance.

    Rows [N, ...] are flattened and brought to length 1. Chance is the same clusters against shuffled labels: above
    1 / classes, for the matching picks the best.
    """
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat -= 0 if _is_gradient(flat) else flat.mean(axis=0)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-30
    if flat.shape[1] > _COMPONENTS and len(flat) > _COMPONENTS:
        flat = PCA(_COMPONENTS, svd_solver="randomized", random_state=0).fit_transform(flat)
    # A batch's losses are the same for all its samples: fewer different rows than classes.
    clusters = min(len(np.unique(labels)), len(np.unique(flat, axis=0)))
    found = KMeans(clusters, n_init=10, random_state=0).fit_predict(flat)
    rng = np.random.default_rng(0)
    chance = [matched(found, rng.permutation(labels)) for _ in range(_SHUFFLES)]
    return matched(found, labels), float(np.mean(chance))


def _is_gradient(flat: NDArray[np.float64]) -> bool:
    # Activations share a large mean that would hide what sets them apart; gradients do not.
    mean = float(np.linalg.norm(flat.mean(axis=0)))
    return mean < 0.3 * float(np.linalg.norm(flat, axis=1).mean())


def matched(found: NDArray[np.integer], labels: Labels) -> float:
    """Accuracy of the best one-to-one match of clusters and classes (Hungarian method)."""
    size = int(max(found.max(), labels.max())) + 1
    table = np.zeros((size, size), dtype=np.int64)
    np.add.at(table, (found, labels), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(labels))


def norm_score(rows: Array, labels: Labels) -> float:
    """How well a gradient's length alone tells one class from the rest: area under the curve, mean over classes.

    0.5 is nothing, 1 is all (norm scoring, arXiv 2102.08504; there for two classes).
    """
    norms = np.linalg.norm(rows.reshape(len(rows), -1), axis=1)
    areas = [roc_auc_score(labels == c, norms) for c in np.unique(labels)]
    return float(np.mean([max(area, 1 - area) for area in areas]))


def of_losses(losses: Array, log_shares_NC: Array, labels: Labels) -> float:
    """Share of labels found by whoever knows the loss of each sample and, nearly, the model that made it."""
    guess = np.abs(losses[:, None] + log_shares_NC).argmin(axis=1)
    return float((guess == labels).mean())


def classes_of(bias_change: Array, labels: Labels) -> tuple[float, float]:
    """Share of a site's classes among as many of the classifier's biases that rose most; and by chance."""
    own = np.unique(labels)
    guess = np.argsort(-bias_change)[: len(own)]
    return float(np.isin(own, guess).mean()), len(own) / len(bias_change)
