"""What the model's outputs say, in words of the task: a class with its probability, or a number in its unit.

One form for the command line, the service and whoever asks in Python. Shapes: N samples, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.scores import NUMBER
from fedsplit.predict.predictor import Predictor


@dataclass(frozen=True, eq=False, slots=True)
class Answer:
    """What the module says of one sample."""

    names: tuple[str, ...]
    """The classes in the order of the outputs; ("number",) where the module predicts a number."""
    values: NDArray[np.float64]
    """[C], the classes' probabilities, which sum to 1; or [1], the number in its unit."""
    best: int
    """The place of the class with the largest output."""

    @property
    def is_number(self) -> bool:
        """Is it a number, and no class?"""
        return self.names == NUMBER

    @property
    def name(self) -> str:
        """The predicted class; "number" for a number."""
        return self.names[self.best]

    @property
    def value(self) -> float:
        """The probability of the predicted class, or the number."""
        return float(self.values[self.best])

    @property
    def finite(self) -> bool:
        """Is there an answer at all? Values that are not finite are none."""
        return bool(np.isfinite(self.values).all())

    @property
    def scores(self) -> dict[str, float]:
        """Class -> probability in the order of the classes; or {"number": value}."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    def record(self, *, scores: bool = False) -> dict[str, Any]:
        """As JSON has it: `class` and `probability`, and with `scores` those of all classes; or `number`."""
        if self.is_number:
            return {"number": self.value}
        said: dict[str, Any] = {"class": self.name, "probability": self.value}
        return said | {"scores": self.scores} if scores else said


def answers(predictor: Predictor, outputs: NDArray[np.float32]) -> list[Answer]:
    """One answer for each row of the outputs [N, C]."""
    if not len(outputs):
        return []
    with np.errstate(invalid="ignore", over="ignore"):
        values = predictor.probabilities(outputs)
    names, best = predictor.classes, outputs.argmax(axis=1).tolist()
    return [Answer(names, row, place) for row, place in zip(values, best, strict=True)]
