"""How a site trains in a round: the settings that round.py, zeroth_order.py and personal.py share.

federation/site.py fills it from the run's configuration; valid from birth, every fault at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsplit.core.errors import ConfigError
from fedsplit.training.task import CLASSIFICATION, Task

LossKind = Literal["softmax", "one-vs-all", "balanced-softmax", "squared", "huber"]
Augmentation = Literal["none", "flip", "crop+flip"]
Precision = Literal["fp32", "bf16"]
ServerMode = Literal["frozen", "hosted", "shared", "zeroth-order"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a site trains in a round."""

    epochs: int
    learning_rate: float
    task: Task = CLASSIFICATION
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    in_flight: int = 2
    lora_learning_rate: float = 0.0
    """Learning rate of all that is not the classifier's; 0: the same."""
    schedule: tuple[float, ...] = ()
    """Factor on the learning rates, one an epoch; empty: 1 throughout."""
    loss: LossKind = "softmax"
    label_smoothing: float = 0.0
    class_counts: tuple[int, ...] = ()
    """The site's training samples a class: what balanced-softmax takes as its prior."""
    clip_norm: float = 0.0
    """Longest gradient, over all that trains; 0: as it is."""
    accumulate: int = 1
    """Batches whose gradients make one step of the optimiser."""
    proximal_mu: float = 0.0
    """FedProx (arXiv 1812.06127): weight of mu/2 |w - w_received|^2 over all that trains."""
    rank_penalty: float = 0.0
    """HetLoRA: weight of |B| |A| over the components from `rank_kept` on."""
    rank_kept: int = 0
    precision: Precision = "fp32"
    augmentation: Augmentation = "none"
    augmentation_key: str = ""
    """What the random choices hang on beside epoch and sample: the run's seed, the site and the round."""
    server_mode: ServerMode = "frozen"

    def __post_init__(self) -> None:
        faults = [
            f"{name}={getattr(self, name)!r} must be {wanted}"
            for name, good, wanted in (
                ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
                ("clip_norm", self.clip_norm >= 0, "0 (off) or more"),
                ("accumulate", self.accumulate >= 1, "at least 1"),
                ("proximal_mu", self.proximal_mu >= 0, "0 (off) or more"),
                ("rank_penalty", self.rank_penalty >= 0, "0 (off) or more"),
                ("schedule", len(self.schedule) in (0, self.epochs), "empty or one an epoch"),
            )
            if not good
        ]
        if self.loss == "balanced-softmax" and not any(self.class_counts):
            faults.append("loss=balanced-softmax wants class_counts, the samples of each class")
        if faults:
            raise ConfigError("; ".join(faults))

    def factor(self, epoch: int) -> float:
        """Factor on the learning rates in an epoch."""
        return self.schedule[epoch] if self.schedule else 1.0
