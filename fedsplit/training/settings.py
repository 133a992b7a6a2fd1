"""How a site trains in a round: the run's settings of training, and what the round adds to them.

round.py, zeroth_order.py and personal.py share it; site/learning.py fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedsplit.core.config import TrainSection
from fedsplit.core.errors import ConfigError
from fedsplit.training.task import CLASSIFICATION, Task

ServerMode = Literal["frozen", "hosted", "shared", "zeroth-order"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a site trains in a round."""

    train: TrainSection
    """The run's. How many epochs a round has is `epochs`, and how its rates go is `schedule`."""
    epochs: int
    task: Task = CLASSIFICATION
    in_flight: int = 2
    schedule: tuple[float, ...] = ()
    """Factor on the learning rates, one an epoch; empty: 1 throughout."""
    class_counts: tuple[int, ...] = ()
    """The site's training samples a class: what balanced-softmax takes as its prior."""
    rank_kept: int = 0
    """HetLoRA: the components that `rank-penalty` leaves alone."""
    augmentation_key: str = ""
    """What the random choices hang on beside epoch and sample: the run's seed, the site and the round."""
    server_mode: ServerMode = "frozen"

    def __post_init__(self) -> None:
        faults = []
        if len(self.schedule) not in (0, self.epochs):
            faults.append(f"schedule={self.schedule!r} must be empty or one an epoch")
        if self.train.loss_kind == "balanced-softmax" and not any(self.class_counts):
            faults.append("loss=balanced-softmax wants class_counts, the samples of each class")
        if faults:
            raise ConfigError("; ".join(faults))

    def factor(self, epoch: int) -> float:
        """Factor on the learning rates in an epoch."""
        return self.schedule[epoch] if self.schedule else 1.0

    def having(self, **fields: str | float) -> TrainSettings:
        """The same with other values in the run's settings of training. They are taken as they are."""
        return replace(self, train=self.train.model_copy(update=fields))
