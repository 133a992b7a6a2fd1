"""EL2N scores of a split device equal those of the whole model; the hardest are the largest of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel, device_part, server_part, whole_model
from fedsplit.training.data import Batch
from fedsplit.training.pipeline import Flow
from fedsplit.training.pruning import hardest, sample_errors
from tests.training.small import BATCHES, Wrapped, text_batches

LORA = ModuleSpec(classes=("dark", "grey", "light"), rank=2, alpha=4)
PROMPT = ModuleSpec(classes=("dark", "grey", "light"), kind="prompt", prompt_tokens=3)


def learnt(backbone: Backbone, spec: ModuleSpec) -> ModuleTensors:
    """A module that tells classes apart, as no fresh one does."""
    rng = np.random.default_rng(0)
    start = module.initial(backbone, spec, seed=0)
    return {n: t + rng.standard_normal(t.shape).astype("f4") * 0.1 for n, t in start.items()}


def split(
    backbone: Backbone, spec: ModuleSpec, cut: Cut, tensors: ModuleTensors
) -> tuple[SplitModel, Wrapped]:
    device, server = device_part(backbone, cut, spec), server_part(backbone, spec)
    module.load(device, tensors)
    module.load(server, tensors)
    encoder = Wrapped(LocalEncoder(server, cut))
    return SplitModel(device, cut, encoder), encoder


def by_hand(
    backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors, batches: list[Batch]
) -> np.ndarray:
    """The scores by the whole model, sample by sample, in numpy's float64."""
    model, found = whole_model(backbone, spec, tensors), []
    for batch in batches:
        with torch.no_grad():
            logits = model(batch.inputs, batch.mask).double().numpy()
        for row, label in zip(logits, batch.labels.tolist(), strict=True):
            error = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            error[label] -= 1
            found.append(math.sqrt((error**2).sum()))
    return np.array(found)


@pytest.mark.parametrize("cut", ["1,3", "0,4", "2,2"])
@pytest.mark.parametrize("spec", [LORA, PROMPT], ids=["lora", "prompt"])
def test_scores_are_the_whole_models(cut: str, spec: ModuleSpec, vit: Backbone) -> None:
    tensors = learnt(vit, spec)
    model, encoder = split(vit, spec, Cut.parse(cut), tensors)
    found = sample_errors(model, BATCHES, Flow())
    wanted = by_hand(vit, spec, tensors, BATCHES)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert wanted.std() > 0.01
    # Samples whose scores differ by less than float32 does may change places.
    assert np.diff(wanted[hardest(found, 1.0)]).max() < 1e-6
    # One forward a sample and nothing kept for a backward.
    assert encoder.samples == (0 if cut == "2,2" else len(wanted))
    assert {want for _, want in encoder.encoded} <= {"output"}
    assert all(p.grad is None for p in module.parameters(model.part).values())


def test_padding_changes_no_score(bert: Backbone) -> None:
    batches, tensors = text_batches(), learnt(bert, LORA)
    model, _ = split(bert, LORA, Cut(1, 3), tensors)
    found = sample_errors(model, batches, Flow())
    np.testing.assert_allclose(found, by_hand(bert, LORA, tensors, batches), atol=1e-6)


def test_a_share_of_the_largest_is_kept_and_ties_keep_their_order() -> None:
    scores = np.array([0.5, 1.0, 0.5, 0.2, 1.0], dtype=np.float32)
    assert hardest(scores, 0.6).tolist() == [1, 4, 0]
    assert hardest(scores, 0.8).tolist() == [1, 4, 0, 2]
    assert hardest(scores, 0.01).tolist() == [1]
    assert hardest(np.ones(4, dtype=np.float32), 1.0).tolist() == [0, 1, 2, 3]
