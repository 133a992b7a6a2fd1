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

from fedsplit.core.scores import CLASS_SCORES, Scoring
from fedsplit.training.losses import Loss, class_loss

if TYPE_CHECKING:
    from fedsplit.training.settings import TrainSettings


class Task(ABC):
    """One kind of target."""

    scoring: ClassVar[Scoring]

    @abstractmethod
    def loss(self, settings: TrainSettings) -> Loss:
        """What training makes small, as the settings ask."""

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


CLASSIFICATION = Classification()
