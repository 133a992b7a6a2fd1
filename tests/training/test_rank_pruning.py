"""HetLoRA's pruning of ranks: the penalty's gradient against autograd, what goes, and when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsplit.core.lora_pairs import later_norm, layers, product, without_later
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import whole_model
from fedsplit.training.rank_pruning import kept_rank, press, prune

SPEC = ModuleSpec(classes=("a", "b"), rank=4, alpha=8)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.find("vit-glyphs")


def tensors_of(backbone: Backbone, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = module.shapes(backbone, SPEC)
    return {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


@given(st.floats(0.01, 1.0), st.integers(1, 1024))
def test_a_site_keeps_one_component_at_least(share: float, rank: int) -> None:
    kept = kept_rank(share, rank)
    assert 1 <= kept <= rank
    assert kept_rank(1.0, rank) == rank


def test_the_penalty_is_the_gradient_of_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = {
        f"{layer}.lora_{half}.weight": nn.Parameter(torch.randn(shape, generator=generator))
        for layer in ("x", "y")
        for half, shape in (("A", (4, 7)), ("B", (5, 4)))
    }
    other = {"classifier.weight": nn.Parameter(torch.randn(2, 3, generator=generator))}
    wanted = sum(
        pairs[f"{x}.lora_B.weight"][:, 3:].norm() * pairs[f"{x}.lora_A.weight"][3:].norm()
        for x in "xy"
    )
    grads = torch.autograd.grad(0.3 * wanted, list(pairs.values()))
    for parameter in (*pairs.values(), *other.values()):
        parameter.grad = torch.ones_like(parameter)
    press(pairs | other, kept=3, weight=0.3)
    for parameter, gradient in zip(pairs.values(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient)
    assert torch.equal(other["classifier.weight"].grad, torch.ones(2, 3))


def test_where_nothing_is_there_to_press_on() -> None:
    """A pair at its start has B = 0; a half that does not train has no gradient."""
    a, b = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(3, 2))
    a.grad, b.grad = torch.zeros(2, 3), torch.zeros(3, 2)
    press({"x.lora_A.weight": a, "x.lora_B.weight": b}, kept=1, weight=5.0)
    assert not a.grad.any()
    assert not b.grad.any()
    a.grad = None
    press({"x.lora_A.weight": a, "x.lora_B.weight": b}, kept=1, weight=5.0)
    assert a.grad is None
    press({"x.lora_B.weight": b}, kept=1, weight=5.0)


def test_later_components_are_what_the_rank_leaves_out(backbone: Backbone) -> None:
    tensors = tensors_of(backbone, 0)
    cut = {n: without_later(n, t, 3) for n, t in tensors.items()}
    missing = [
        product(tensors, layer, scale=1.0) - product(cut, layer, scale=1.0)
        for layer in layers(tensors)
    ]
    assert later_norm(tensors, 3) == pytest.approx(
        sum(float(np.linalg.norm(m)) for m in missing), rel=1e-5
    )
    assert later_norm(cut, 3) == later_norm(tensors, 4) == 0
    assert later_norm(cut, 2) > 0
    kept = [n for n in tensors if ".lora_" not in n]
    assert kept
    assert all(cut[n] is tensors[n] for n in kept)


@pytest.mark.parametrize(("grown", "rank"), [(0.9, 2), (1.0, 4), (1.1, 4)])
def test_they_go_when_training_has_shrunk_them(grown: float, rank: int, backbone: Backbone) -> None:
    start = tensors_of(backbone, 1)
    trained = {n: t * np.float32(grown) if ".lora_B." in n else t for n, t in start.items()}
    part = whole_model(backbone, SPEC, trained).part
    assert prune(part, start, rank=4, share=0.5) == rank
    now = module.read(part)
    for name, value in trained.items():
        wanted = without_later(name, value, 2) if rank == 2 else value
        np.testing.assert_array_equal(now[name], wanted)


def test_nothing_to_prune(backbone: Backbone) -> None:
    start = tensors_of(backbone, 1)
    less = {n: t * np.float32(0.5) for n, t in start.items()}
    part = whole_model(backbone, SPEC, less).part
    # All of it, or the last one.
    assert prune(part, start, rank=4, share=1.0) == 4
    assert prune(part, start, rank=1, share=0.2) == 1
    assert all(np.array_equal(t, less[n]) for n, t in module.read(part).items())
