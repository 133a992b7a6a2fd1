"""From gradients to a step: learning rates a group, accumulation, the proximal pull, the penalty on ranks, clipping.

With the defaults it does what torch's optimiser does and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsplit.model import module
from fedsplit.model.part import Part
from fedsplit.training.rank_pruning import press
from fedsplit.training.settings import TrainSettings

Arrays = Mapping[str, NDArray[np.float32]]


def trained(part: Part) -> dict[str, nn.Parameter]:
    """The module's parameters that train here, by the whole model's names."""
    return {n: p for n, p in module.parameters(part).items() if p.requires_grad}


def is_classifier(part: Part, name: str) -> bool:
    """Does the tensor belong to what makes logits of pooled features?"""
    return name.split(".", 1)[0] in part.family.classifier


def learning_rates(part: Part, settings: TrainSettings) -> dict[str, float]:
    """Name -> learning rate of each tensor that trains: the classifier's or the other one."""
    other = settings.train.lora_learning_rate or settings.train.learning_rate
    return {
        n: settings.train.learning_rate if is_classifier(part, n) else other for n in trained(part)
    }


class Stepper:
    """Gradients of batches in, steps of the optimiser out."""

    def __init__(
        self, part: Part, settings: TrainSettings, *, anchor: Arrays | None = None
    ) -> None:
        """`anchor`: what the proximal term pulls to; without one, the values at this moment."""
        self._settings = settings
        self._parameters = trained(part)
        self._optimizer = optimizer(
            self._parameters, learning_rates(part, settings), settings=settings
        )
        self._anchor = _anchor(self._parameters, anchor) if settings.train.proximal_mu else {}
        self._sums: dict[str, Tensor] = {}
        self._batches = self._samples = 0

    def set_factor(self, factor: float) -> None:
        """Learning rates from here on, as a factor on their full values."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def backward(self, loss: Tensor, samples: int) -> None:
        """Take in the gradient of a batch's mean loss; step when enough batches are in."""
        self._optimizer.zero_grad(set_to_none=True)
        # By zeroth order at the encoder, with nothing that trains here, no gradient is wanted anywhere.
        if self._parameters or loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self._batches += 1
        if self._settings.train.accumulate > 1:
            self._add(samples)
        if self._batches == self._settings.train.accumulate:
            self.step()

    def step(self) -> None:
        """Step with what is in; nothing where nothing is."""
        if not self._batches:
            return
        if self._settings.train.accumulate > 1:
            for name, sum_ in self._sums.items():
                self._parameters[name].grad = sum_ / self._samples
            self._sums, self._samples = {}, 0
        self._batches = 0
        for name, received in self._anchor.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(
                    parameter.detach() - received, alpha=self._settings.train.proximal_mu
                )
        if self._settings.train.rank_penalty:
            press(self._parameters, self._settings.rank_kept, self._settings.train.rank_penalty)
        if self._settings.train.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.train.clip_norm)
        self._optimizer.step()

    def _add(self, samples: int) -> None:
        # Each batch's own mean stays what it is, for the encoder behind the seam sees it too.
        self._samples += samples
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                weighted = parameter.grad * samples
                self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted


def optimizer(
    parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], *, settings: TrainSettings
) -> torch.optim.Optimizer:
    """The settings' optimiser with one parameter group a learning rate."""
    # The classifier's group comes last, as its rate is `learning_rate`; it may be the only one.
    groups: dict[float, list[nn.Parameter]] = {}
    for name in sorted(parameters, key=lambda n: rates[n] == settings.train.learning_rate):
        groups.setdefault(rates[name], []).append(parameters[name])
    # Where only the encoder trains nothing does here; torch takes an empty group, but not no group.
    groups = groups or {settings.train.learning_rate: []}
    kind = torch.optim.AdamW if settings.train.optimizer == "adamw" else torch.optim.SGD
    return kind(
        [{"params": of, "lr": rate, "initial_lr": rate} for rate, of in groups.items()],
        weight_decay=settings.train.weight_decay,
    )


def _anchor(parameters: Mapping[str, nn.Parameter], given: Arrays | None) -> dict[str, Tensor]:
    if given is None:
        return {n: p.detach().clone() for n, p in parameters.items()}
    return {n: torch.from_numpy(np.array(given[n], dtype=np.float32)) for n in parameters}
