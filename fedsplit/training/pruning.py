"""Which training samples a model has most to learn from: those with the largest EL2N scores.

EL2N is the length of the error, |softmax(logits) - one-hot label| (Paul et al., arXiv 2107.07075). Called by
site/learning.py. Shapes: N samples, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedsplit.model.split import SplitModel
from fedsplit.training import pipeline
from fedsplit.training.data import Batch
from fedsplit.training.pipeline import Flow


def el2n(model: SplitModel, batches: Iterable[Batch], flow: Flow) -> NDArray[np.float32]:
    """The score of each sample in the batches' order, [N], in 0 to sqrt 2; one forward a sample, no gradient."""
    scores = []
    with torch.no_grad():
        for batch, z in pipeline.ahead(model, batches, flow):
            logits_BC = pipeline.tail(model, z, batch.mask, flow.precision)
            right_BC = nn.functional.one_hot(batch.labels, logits_BC.shape[1])
            scores.append(torch.linalg.vector_norm(logits_BC.softmax(dim=1) - right_BC, dim=1))
    return torch.cat(scores).cpu().numpy()


def hardest(scores_N: NDArray[np.float32], share: float) -> NDArray[np.int64]:
    """Positions of the largest scores, the largest first, equal ones in their order: a `share` of N, at least one."""
    return np.argsort(-scores_N, kind="stable")[: max(1, round(share * len(scores_N)))]
