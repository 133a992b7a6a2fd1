"""The best module of a run so far, for early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsplit.core.scores import Scores, Scoring
from fedsplit.model.module import ModuleTensors


class Best:
    """Remembers the module with the best main score, and how long ago that was."""

    def __init__(self, scoring: Scoring, *, patience: int) -> None:
        """`patience`: rounds without a better score after which it is over; 0 never ends, and keeps nothing."""
        self.module: ModuleTensors = {}
        self._scoring = scoring
        self._patience = patience
        self._score: float | None = None
        self._since = 0

    def improved(self, scores: Scores | None) -> bool:
        """Take in a round's scores; True when its module is to be kept."""
        if not self._patience:
            return False
        now = None if scores is None else scores[self._scoring.main]
        if now is not None and (self._score is None or self._scoring.better(now, self._score)):
            self._score, self._since = now, 0
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

    def state(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"score": self._score, "since": self._since}

    def restore(self, state: Mapping[str, Any], module: ModuleTensors) -> None:
        """Go on from what `state` and `module` were."""
        self.module = dict(module)
        score = state.get("score")
        self._score = None if score is None else float(score)
        self._since = int(state.get("since", 0))
