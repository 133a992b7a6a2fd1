"""Which training samples a model has most to learn from: those with the largest errors, as the task has them.

Of classes these are EL2N scores (Paul et al., arXiv 2107.07075). Shapes: N samples, B batch, C
outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.model.split import SplitModel
from fedsplit.training import pipeline
from fedsplit.training.data import Batch
from fedsplit.training.pipeline import Flow
from fedsplit.training.task import CLASSIFICATION, Task


def sample_errors(
    model: SplitModel,
    batches: Iterable[Batch],
    flow: Flow,
    task: Task = CLASSIFICATION,
) -> NDArray[np.float32]:
    """The error of each sample in the batches' order, [N]; one forward a sample, no gradient."""
    scores = []
    with torch.no_grad():
        for batch, z in pipeline.ahead(model, batches, flow):
            logits_BC = pipeline.tail(model, z, batch.mask, flow.precision)
            scores.append(task.errors(logits_BC, batch.labels))
    return torch.cat(scores).cpu().numpy()


def hardest(scores_N: NDArray[np.float32], share: float) -> NDArray[np.int64]:
    """Positions of the largest scores, the largest first, equal ones in their order: a `share` of N, at least one."""
    return np.argsort(-scores_N, kind="stable")[: max(1, round(share * len(scores_N)))]
