"""Steps that leave an encoder early: the values of the shorter model, what they train, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import server_part
from fedsplit.trunk.host import BackboneHost
from tests.trunk.wire import grant

SPEC = ModuleSpec(classes=("a", "b"), kind="full")
RATE = 0.1
SGD = EncoderTraining(mode="hosted", optimizer="sgd", learning_rate=RATE)


@pytest.fixture(scope="module")
def vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture
def start(vit: Backbone) -> module.ModuleTensors:
    return module.initial(vit, SPEC, seed=0)


@pytest.fixture
def host(vit: Backbone, start: module.ModuleTensors) -> BackboneHost:
    host = BackboneHost(vit)
    wanted = module.server_names(vit, SPEC)
    host.publish("v", module.pack(SPEC, {n: start[n] for n in wanted}))
    return host


def open_site(
    host: BackboneHost, leave: int, site: str = "s", cut: str = "1,4", **other: Any
) -> Any:
    training = SGD.model_copy(update={"leave": leave} | other)
    return host.open(grant(host.backbone, Cut.parse(cut), site=site, training=training))


def make_h(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 5, 24), dtype=np.float32)


def make_dz(seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 24), dtype=np.float32)


@pytest.mark.parametrize("leave", [2, 3, 4])
def test_a_step_is_that_of_the_blocks_up_to_there_and_the_pooling(
    leave: int, host: BackboneHost, vit: Backbone, start: module.ModuleTensors
) -> None:
    part = server_part(vit, SPEC)
    module.load(part, {n: start[n] for n in module.server_names(vit, SPEC)})
    names = [n for n in module.server_names(vit, SPEC) if module.depth(vit, n) >= 1]
    parameters = module.parameters(part)
    for name in names:
        parameters[name].requires_grad_()
    h = torch.from_numpy(make_h()).requires_grad_()
    z = part.ends.pool(part.trunk.run(h, None, 1, leave), None)
    found = torch.autograd.grad(
        z, [h, *(parameters[n] for n in names)], torch.from_numpy(make_dz()), allow_unused=True
    )
    reached = {n: g for n, g in zip(names, found[1:], strict=True) if g is not None}

    session = open_site(host, leave)
    np.testing.assert_array_equal(session.encode(1, make_h(), want="gradient"), z.detach().numpy())
    np.testing.assert_array_equal(session.settle(1, make_dz()), found[0].numpy())
    delta = host.collect("v")["s"]
    # Later blocks have no gradient and no change; the pooling has one.
    assert delta.keys() == reached.keys()
    assert max(module.depth(vit, n) for n in delta) == vit.blocks
    assert {module.depth(vit, n) for n in delta} == {*range(1, leave), vit.blocks}
    for name, gradient in reached.items():
        np.testing.assert_allclose(delta[name], -RATE * gradient.numpy(), atol=1e-6)


def test_tests_go_through_all_blocks(host: BackboneHost) -> None:
    short, frozen = open_site(host, 2), host.open(grant(host.backbone, Cut(1, 4)))
    np.testing.assert_array_equal(short.encode(1, make_h()), frozen.encode(1, make_h()))
    early = short.encode(2, make_h(), want="gradient")
    assert not np.array_equal(early, frozen.encode(2, make_h()))
    short.settle(2, make_dz(), quiet=True)
    whole = open_site(host, 0, "whole")
    moved = short.encode(3, make_h())
    assert not np.array_equal(moved, whole.encode(3, make_h()))


def test_sites_of_one_copy_may_leave_it_after_different_blocks(host: BackboneHost) -> None:
    sites = [open_site(host, leave, f"s{leave}", mode="shared", weight=0.5) for leave in (2, 4)]
    for session in sites:
        session.encode(1, make_h(), want="gradient")
        session.settle(1, make_dz(), quiet=True)
    delta = host.collect("v")[""]
    assert {module.depth(host.backbone, n) for n in delta} == {1, 2, 3, 4}


@pytest.mark.parametrize(("leave", "cut"), [(1, "1,4"), (5, "1,4"), (2, "1,3")])
def test_where_nothing_can_leave(leave: int, cut: str, host: BackboneHost) -> None:
    for mode in ("hosted", "shared"):
        with pytest.raises(RefusedError, match=f"steps are to leave after block {leave} of cut"):
            open_site(host, leave, cut=cut, mode=mode)
    assert host._trainees.held_bytes == 0
