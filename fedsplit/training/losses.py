"""Losses of a batch: softmax, one-vs-all and balanced softmax, each the mean over its samples.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedsplit.training.settings import TrainSettings

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, C], labels [B]) -> mean over the batch."""


def class_loss(settings: TrainSettings) -> Loss:
    """The loss of classes that the settings ask for."""
    if settings.train.loss_kind == "one-vs-all":
        return one_vs_all(settings.train.label_smoothing)
    if settings.train.loss_kind == "balanced-softmax":
        return balanced_softmax(settings.class_counts, settings.train.label_smoothing)
    return softmax(settings.train.label_smoothing)


def softmax(label_smoothing: float = 0.0) -> Loss:
    """Cross entropy."""

    def loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)

    return loss


def one_vs_all(label_smoothing: float = 0.0) -> Loss:
    """One binary cross entropy a class, summed over the classes (OvA-LP, RESEARCH.md's linear probe).

    Summed, not averaged: each class is a problem of its own, whose step must not shrink with their number.
    A class that a site lacks only learns what it is not, without pulling on the other classes' scores.
    """

    def loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        targets_BC = nn.functional.one_hot(labels_B, logits_BC.shape[1]).to(logits_BC.dtype)
        if label_smoothing:
            targets_BC = targets_BC * (1 - label_smoothing) + 0.5 * label_smoothing
        each_BC = nn.functional.binary_cross_entropy_with_logits(
            logits_BC, targets_BC, reduction="none"
        )
        return each_BC.sum(dim=1).mean()

    return loss


def balanced_softmax(counts: Sequence[int], label_smoothing: float = 0.0) -> Loss:
    """Cross entropy of logits plus the log of the site's class frequencies (arXiv 2007.10740, eq. 3).

    The prior explains the site's skew, so the classifier need not: Fed-RoD's generic loss (arXiv 2107.00778).
    Classes without a sample take no part: their logits get no gradient here.
    """
    counts_C = torch.tensor(counts, dtype=torch.float32)
    present_C = counts_C > 0
    prior_C = (counts_C / counts_C.sum()).log()

    def loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        log_probability_BC = nn.functional.log_softmax(logits_BC + prior_C, dim=1)
        right = -log_probability_BC.gather(1, labels_B[:, None]).mean()
        if not label_smoothing:
            return right
        # Smoothing over the classes that are there: log 0 of the others would be all that is left.
        even = -log_probability_BC[:, present_C].mean()
        return (1 - label_smoothing) * right + label_smoothing * even

    return loss
