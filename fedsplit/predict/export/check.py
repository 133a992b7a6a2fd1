"""Do an export and its module answer alike? On invented inputs of several batch sizes and lengths.

Shapes: N samples, C outputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ExportError
from fedsplit.predict.predictor import Predictor
from fedsplit.training.data import TextTransform
from fedsplit.training.data.transform import Prepared

TOLERANCE = 1e-4
"""Of the largest output (at least 1): sums in another order differ by less, a forgotten tensor by far more."""
_ROWS = (1, 2, 5)
Answer = Callable[[list[Prepared]], NDArray[np.float32]]


def largest_difference(predictor: Predictor, answer: Answer, *, what: str) -> float:
    """How far `answer` is from the module's own outputs at most, as a share of them. Raises ExportError above TOLERANCE."""
    worst = 0.0
    for batch in batches(predictor):
        want, got = predictor.outputs(batch), answer(batch)
        worst = max(worst, difference(want, got))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{what} does not answer as the module does: its outputs differ by {worst:.2g} of the largest, at most "
            f"{TOLERANCE:g} is wanted; nothing was written. Please report this with the names of the family and module kind"
        )
    return worst


def difference(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """The largest difference over the largest output, or over 1; NaN counts as infinite."""
    if want.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / max(1.0, float(np.abs(want).max())))


def batches(predictor: Predictor) -> Iterator[list[Prepared]]:
    """Noise as images; random words as texts, of one length and of several. The same every time."""
    rng = np.random.default_rng(0)
    for rows in _ROWS:
        yield [_invented(predictor, rng) for _ in range(rows)]
    if predictor.kind == "text":
        same = _invented(predictor, rng)
        yield [same, same]


def _invented(predictor: Predictor, rng: np.random.Generator) -> Prepared:
    transform = predictor.transform
    if not isinstance(transform, TextTransform):
        return rng.integers(0, 256, (*transform.settings.output, 3), dtype=np.uint8)
    tokenizer = transform.tokenizer
    special = set(tokenizer.all_special_ids)
    vocabulary = min(len(tokenizer), int(predictor.backbone.config.vocab_size))
    words = np.array([i for i in range(vocabulary) if i not in special], dtype=np.int32)
    # Whether the tokenizer gives type ids besides: as it does for a text of its own.
    kinds = len(transform.tokens(["a"])[0])
    ids = np.zeros((kinds, int(rng.integers(1, transform.max_length + 1))), dtype=np.int32)
    ids[0] = rng.choice(words, ids.shape[1])
    return ids
