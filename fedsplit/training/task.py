"""What a task is: what a label is, the loss, how a test adds up, what an error is, and what a prediction is.

One object a site and run; training, tests and predictions ask it. Its scores are core/scores.py's, which the server
knows too. Shapes: B batch, C outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fedsplit.core.scores import CLASS_SCORES, NUMBER_SCORES, Scale, Scoring
from fedsplit.training.losses import Loss, class_loss

if TYPE_CHECKING:
    from fedsplit.training.settings import TrainSettings


class Task(ABC):
    """One kind of target."""

    scoring: ClassVar[Scoring]

    @abstractmethod
    def loss(self, settings: TrainSettings) -> Loss:
        """What training makes small, as the settings ask."""

    def targets(self, labels_B: Tensor) -> Tensor:
        """What the outputs are to be for these labels: the number of a class, or a number on the outputs' scale."""
        return labels_B

    @abstractmethod
    def sums(self, outputs_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
        """What a batch adds to a test: one number for each of the scoring's sums."""

    @abstractmethod
    def errors(self, outputs_BC: Tensor, labels_B: Tensor) -> Tensor:
        """[B], how far each output is from its label."""

    @abstractmethod
    def prediction(self, outputs_C: Tensor, names: Sequence[str]) -> dict[str, float]:
        """What the model says of one sample; `names` are those of the outputs."""


@dataclass(frozen=True)
class Classification(Task):
    """A label is the number of a class; an output is a class' logit."""

    scoring = CLASS_SCORES

    def loss(self, settings: TrainSettings) -> Loss:
        """Softmax, one-vs-all or balanced softmax."""
        return class_loss(settings)

    def sums(self, outputs_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
        """Right answers."""
        return {"correct": float((outputs_BC.argmax(dim=1) == labels_B).sum())}

    def errors(self, outputs_BC: Tensor, labels_B: Tensor) -> Tensor:
        """EL2N: |softmax(logits) - one-hot label|, in 0 to sqrt 2 (Paul et al., arXiv 2107.07075)."""
        right_BC = nn.functional.one_hot(labels_B, outputs_BC.shape[1])
        errors_B: Tensor = torch.linalg.vector_norm(outputs_BC.softmax(dim=1) - right_BC, dim=1)
        return errors_B

    def prediction(self, outputs_C: Tensor, names: Sequence[str]) -> dict[str, float]:
        """Class -> its share, the largest first."""
        found = zip(names, outputs_C.softmax(dim=0).tolist(), strict=True)
        return dict(sorted(found, key=lambda entry: -entry[1]))


@dataclass(frozen=True)
class Regression(Task):
    """A label is a number in its own unit, float64; the one output is that number on the scale the sites agreed on."""

    scale: Scale

    scoring = NUMBER_SCORES

    def targets(self, labels_B: Tensor) -> Tensor:
        """float32 [B]"""
        return ((labels_B - self.scale.mean) / self.scale.deviation).float()

    def loss(self, settings: TrainSettings) -> Loss:
        """The mean squared error, or Huber's with its bend at one deviation."""
        measure = (
            nn.functional.huber_loss
            if settings.train.loss_kind == "huber"
            else nn.functional.mse_loss
        )

        def loss(outputs_BC: Tensor, labels_B: Tensor) -> Tensor:
            return measure(outputs_BC[:, 0], self.targets(labels_B))

        return loss

    def sums(self, outputs_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
        """Errors and numbers, in the numbers' own unit."""
        numbers_B = labels_B.double() - self.scale.mean
        errors_B = outputs_BC[:, 0].double() * self.scale.deviation - numbers_B
        return {
            "abs": float(errors_B.abs().sum()),
            "sq": float(errors_B.square().sum()),
            "y": float(numbers_B.sum()),
            "yy": float(numbers_B.square().sum()),
        }

    def errors(self, outputs_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Absolute errors, in deviations."""
        return (outputs_BC[:, 0] - self.targets(labels_B)).abs()

    def prediction(self, outputs_C: Tensor, names: Sequence[str]) -> dict[str, float]:
        """The number."""
        return {names[0]: float(outputs_C[0]) * self.scale.deviation + self.scale.mean}


CLASSIFICATION = Classification()
