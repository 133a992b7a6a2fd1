"""The best module of a run so far, for early stopping. Called by the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.model.module import ModuleTensors


class Best:
    """Remembers the most accurate module, and how long ago that was."""

    def __init__(self, *, patience: int) -> None:
        """`patience`: rounds without a better accuracy after which it is over; 0 never ends, and keeps nothing."""
        self.module: ModuleTensors = {}
        self._patience = patience
        self._accuracy = -1.0
        self._since = 0

    def improved(self, accuracy: float | None) -> bool:
        """Take in a round's accuracy; True when its module is to be kept."""
        if not self._patience:
            return False
        if accuracy is not None and accuracy > self._accuracy:
            self._accuracy, self._since = accuracy, 0
            return True
        self._since += 1
        return False

    def keep(self, module: Mapping[str, Any]) -> None:
        """This is the best module so far."""
        self.module = dict(module)

    @property
    def over(self) -> bool:
        """Has nothing improved for as long as the patience lasts?"""
        return bool(self._patience) and self._since >= self._patience

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"accuracy": self._accuracy, "since": self._since}

    def restore(self, state: Mapping[str, float], module: ModuleTensors) -> None:
        """Go on from what `state` and `module` were."""
        self.module = dict(module)
        self._accuracy = float(state.get("accuracy", -1.0))
        self._since = int(state.get("since", 0))
