"""What enters the linear layer that makes the logits: seen on the way, in every family, without a second pass.

closed_form.py solves for that layer, personal.py puts another one beside it. Shapes: B batch, F features that
enter it, C classes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fedsplit.model.part import Part


def last_linear(part: Part) -> nn.Linear:
    """The layer itself."""
    layer: nn.Linear = part.model.get_submodule(part.family.final_linear)
    return layer


class LastInput:
    """While entered, `features` [B, F] is what last went into the layer, detached, fp32."""

    def __init__(self, part: Part) -> None:
        self._layer = last_linear(part)
        self._features: Tensor | None = None
        self._hook: Any = None

    @property
    def features(self) -> Tensor:
        """Features of the latest batch."""
        assert self._features is not None, "no batch went through the tail yet"
        return self._features

    def __enter__(self) -> LastInput:
        self._hook = self._layer.register_forward_pre_hook(self._see)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hook.remove()

    def _see(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._features = args[0].detach().float()
