"""How sites train: how long, by which gradient and optimiser, with which loss, and what of it stays with them."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from fedsplit.core.config.section import Check, Section

LossKind = Literal["softmax", "one-vs-all", "balanced-softmax", "squared", "huber"]
Augmentation = Literal["none", "flip", "crop+flip"]
Precision = Literal["fp32", "bf16"]


class TrainSection(Section):
    """How sites train."""

    rounds: int = Field(default=5, ge=0, le=100_000)
    """Rounds of training. One more message tests the last module."""
    local_epochs: int = Field(default=1, ge=1, le=1000)
    """How often a site goes through its training samples in a round."""
    local_loss_epochs: int = Field(default=0, ge=0, le=1000)
    """How often a site first goes through its training samples in a round with head joined to tail, without the encoder."""
    keep_hardest: float = Field(default=1.0, gt=0, le=1)
    """Share of its training samples that a site trains on in a round: those with the largest errors at its start; 1: all."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Samples in a step. A site's token allows no more."""
    gradient: Literal["exact", "zeroth-order"] = "exact"
    """How the device finds its gradient: by backpropagation, or only from differences of losses."""
    zo_estimator: Literal["forward", "central", "one-point"] = "central"
    """Zeroth-order estimator. A step takes q+1, 2q or q forwards."""
    zo_queries: int = Field(default=1, ge=1, le=1024)
    """q, the number of directions in a zeroth-order step."""
    zo_epsilon: float = Field(default=0.01, gt=0, le=10)
    """Length of a zeroth-order perturbation."""
    zo_directions: Literal["gaussian", "sphere"] = "gaussian"
    """How zeroth-order directions are drawn."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The site's optimiser. It starts again in each round."""
    learning_rate: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Learning rate of the classifier, and of the rest if lora-learning-rate is 0. 0 means 0.01, or 0.003 if no setting of the classifier is given and it trains on from ridge."""
    lora_learning_rate: float = Field(default=0.0005, ge=0, allow_inf_nan=False)
    """Learning rate of everything that trains except the classifier; 0: the classifier's. With a shared encoder: of all sites' steps together."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rates change over the rounds: cosine falls from the full rate towards 0."""
    warmup_rounds: int = Field(default=0, ge=0, le=100_000)
    """Number of first rounds in which the learning rates rise to the full rate."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of the optimiser."""
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Largest gradient norm of a step on the device; 0: no limit."""
    accumulate: int = Field(default=1, ge=1, le=1024)
    """Number of batches whose gradients make one optimiser step."""
    loss: Literal["auto", LossKind] = "auto"
    """For classes: cross-entropy, one yes-or-no question for each class, or cross-entropy balanced by the site's mix of classes. For numbers: squared error or Huber's loss. auto: squared for numbers; softmax for classes, but balanced-softmax if no setting of the classifier is given and it trains on from ridge."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the label that is spread over all classes."""
    augmentation: Augmentation = "none"
    """Random changes of training images."""
    precision: Precision = "fp32"
    """Arithmetic of the device's blocks in training. bf16 needs a CPU, or a GPU that supports it."""
    proximal_mu: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """FedProx: weight of the squared distance to the received module."""
    rank_penalty: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """HetLoRA: the weight in the loss of the components that rank-pruning may remove."""
    personalisation: Literal["none", "ditto", "fed-rod"] = "none"
    """What a site keeps for itself besides the averaged module."""
    ditto_lambda: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """How strongly Ditto holds the personal module near the averaged one."""
    site_local: Literal["none", "classifier", "all"] = "none"
    """What the device trains and never sends: nothing, its classifier, or everything."""
    sync_every: int = Field(default=1, ge=1)
    """Rounds between two averages of what the devices train. In between it stays at the site."""

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        zeroth = self.gradient == "zeroth-order"
        return [
            (
                self.warmup_rounds >= max(self.rounds, 1),
                f"warmup-rounds={self.warmup_rounds} leaves none of rounds={self.rounds}; lower it",
            ),
            (
                zeroth and self.optimizer != "sgd",
                f"gradient=zeroth-order steps by SGD, optimizer={self.optimizer}; set optimizer=sgd",
            ),
            (
                zeroth and self._beyond_zeroth_order,
                "gradient=zeroth-order takes no accumulate, clip-norm, proximal-mu or precision; leave them out",
            ),
            (
                zeroth and self.keep_hardest < 1,
                f"keep-hardest={self.keep_hardest:g}: gradient=zeroth-order is replayed as steps over all of a site's "
                f"samples; leave keep-hardest out",
            ),
            (
                zeroth and (self.site_local != "none" or self.personalisation != "none"),
                "gradient=zeroth-order sends seeds and scalars of all it trains; leave site-local and "
                "personalisation out",
            ),
            (
                self.personalisation == "fed-rod"
                and self.loss in ("one-vs-all", "balanced-softmax"),
                "personalisation=fed-rod is made for loss=softmax",
            ),
        ]

    @property
    def _beyond_zeroth_order(self) -> bool:
        dials = self.accumulate > 1 or self.clip_norm > 0 or self.proximal_mu > 0
        return dials or self.precision != "fp32"

    @property
    def keeps(self) -> bool:
        """Do sites keep tensors in some rounds, where others are averaged?"""
        return self.site_local != "none" or self.sync_every > 1

    @property
    def loss_kind(self) -> LossKind:
        """The loss; `from_flat` has settled an auto already."""
        return "softmax" if self.loss == "auto" else self.loss

    def learning_rate_factor(self, round_: int) -> float:
        """Factor on the learning rate in a round: a straight rise, then half a cosine over the rest."""
        if round_ <= self.warmup_rounds:
            return round_ / (self.warmup_rounds + 1)
        if self.lr_schedule == "constant":
            return 1.0
        done, all_ = round_ - self.warmup_rounds - 1, self.rounds - self.warmup_rounds
        return 0.5 * (1 + math.cos(math.pi * done / all_))

    def syncs(self, round_: int) -> bool:
        """Is what the devices trained sent and averaged in this round? The last round always is."""
        return round_ % self.sync_every == 0 or round_ == self.rounds
