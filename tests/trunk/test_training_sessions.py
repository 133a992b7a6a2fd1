"""Sessions that train, on one host in this process: who steps what, turns, several at once, and what is freed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import EncoderError, OverloadedError, ProtocolError, RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.trained_tensors import trained_at
from fedsplit.trunk.host import MAX_VERSIONS, BackboneHost
from fedsplit.trunk.training import copy_bytes
from tests.model.whole import SPEC
from tests.trunk.wire import grant, packed

RATE = 0.01
SGD = EncoderTraining(mode="hosted", optimizer="sgd", learning_rate=RATE)
ADAMW = EncoderTraining(mode="hosted", learning_rate=RATE, weight_decay=0.1)


@pytest.fixture(scope="module")
def vit(tiny: dict[str, Path]) -> Backbone:
    return Backbone.find(str(tiny["vit"]))


@pytest.fixture
def host(vit: Backbone) -> BackboneHost:
    """A host with the trained start as version "v"."""
    host = BackboneHost(vit)
    host.publish("v", packed(host.backbone))
    return host


def make_h(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 5, 24), dtype=np.float32)


def open_site(
    host: BackboneHost, training: EncoderTraining | None, site: str = "s", cut: str = "1,3"
) -> Any:
    return host.open(grant(host.backbone, Cut.parse(cut), site=site, training=training))


def shared(weight: float) -> EncoderTraining:
    return SGD.model_copy(update={"mode": "shared", "weight": weight})


def one_model(weight: float) -> EncoderTraining:
    """How a copy of one's own takes the steps that a share of `weight` takes on a shared one."""
    return SGD.model_copy(update={"learning_rate": weight * SGD.learning_rate})


def test_shared_is_one_model_that_the_sites_step_in_turn(host: BackboneHost) -> None:
    alone = open_site(host, one_model(0.5), "alone")
    sites = [open_site(host, shared(0.5), site) for site in "xyxy"]
    for step, site in enumerate(sites):
        h, dz = make_h(step), make_h(10 + step)
        np.testing.assert_array_equal(
            site.encode(0, h, want="gradient"), alone.encode(step, h, want="gradient")
        )
        np.testing.assert_array_equal(site.settle(0, dz), alone.settle(step, dz))
    found = host.collect("v")
    assert found[""].keys() == found["alone"].keys()
    for name, delta in found["alone"].items():
        np.testing.assert_array_equal(found[""][name], delta)


def test_a_site_tests_what_it_received_until_it_trains(host: BackboneHost) -> None:
    received = open_site(host, None).encode(0, make_h())
    first, second = open_site(host, shared(0.5), "first"), open_site(host, shared(0.5), "second")
    one_step(first)
    np.testing.assert_array_equal(second.encode(0, make_h()), received)
    moved = first.encode(1, make_h())
    assert np.abs(moved - received).max() > 1e-4
    np.testing.assert_array_equal(second.encode(1, make_h(), want="gradient"), moved)
    np.testing.assert_array_equal(second.encode(2, make_h()), moved)


def test_a_turn_that_ran_out_still_steps_by_the_gradient_of_its_own_forward(
    host: BackboneHost,
) -> None:
    frozen = open_site(host, None)
    slow, quick = open_site(host, shared(0.5), "slow"), open_site(host, shared(0.5), "quick")
    slow._turns._wait_s = 0.05
    slow.encode(0, make_h(), want="gradient")
    frozen.encode(0, make_h(), want="gradient")
    quick.encode(0, make_h(), want="gradient")
    quick.settle(0, make_h(1))
    np.testing.assert_array_equal(slow.settle(0, make_h(2)), frozen.settle(0, make_h(2)))


def test_shared_takes_sites_of_several_cuts(host: BackboneHost) -> None:
    open_site(host, shared(0.5), "z", "0,4")
    for site, cut in (("x", "0,2"), ("y", "2,4")):
        session = open_site(host, shared(0.5), site, cut)
        z = session.encode(0, make_h(), want="gradient")
        session.settle(0, np.ones_like(z))
    delta = host.collect("v")[""]
    assert delta.keys() == module.server_names(host.backbone, SPEC)
    open_site(host, shared(0.5))
    with pytest.raises(RefusedError, match="train it alike"):
        open_site(host, shared(0.5).model_copy(update={"learning_rate": 1.0}))


def test_a_session_may_have_several_steps_under_way(host: BackboneHost) -> None:
    session, fresh = open_site(host, ADAMW), open_site(host, None)
    for step in (0, 1):
        session.encode(step, make_h(step), want="gradient")
        fresh.encode(step, make_h(step), want="gradient")
    for step in (0, 1):
        np.testing.assert_array_equal(
            session.settle(step, make_h(7)), fresh.settle(step, make_h(7))
        )
    with pytest.raises(ProtocolError, match="is not held"):
        session.settle(1, make_h())
    assert session.kept_steps == 0


def test_sessions_at_once_do_not_disturb_each_other(host: BackboneHost) -> None:
    frozen = open_site(host, None)
    frozen.encode(0, make_h(), want="gradient")
    dh = frozen.settle(0, make_h(1))
    start = threading.Barrier(4)

    def run(site: str) -> np.ndarray:
        session = open_site(host, SGD, site)
        session.encode(0, make_h(), want="gradient")
        start.wait(20)
        first = session.settle(0, make_h(1))
        five_steps(session)
        return first

    with ThreadPoolExecutor(4) as pool:
        for first in pool.map(run, "wxyz"):
            np.testing.assert_array_equal(first, dh)
    deltas = host.collect("v")
    assert deltas.keys() == set("wxyz")
    for delta in deltas.values():
        for name, value in delta.items():
            np.testing.assert_array_equal(value, deltas["w"][name])


def test_sites_at_once_on_a_shared_copy_lose_no_step_and_take_no_old_one(
    host: BackboneHost,
) -> None:
    """All sites send the same, so the order of their turns makes no difference, and twenty steps are those of one model."""
    start = threading.Barrier(4)

    def run(site: str) -> None:
        session = open_site(host, shared(0.25), site)
        start.wait(20)
        five_steps(session)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, "wxyz"))
    alone = open_site(host, one_model(0.25), "alone")
    for _ in range(4):
        five_steps(alone, close=False)
    found = host.collect("v")
    for name, delta in found["alone"].items():
        np.testing.assert_array_equal(found[""][name], delta)


def five_steps(session: Any, *, close: bool = True) -> None:
    for step in range(1, 6):
        session.encode(step, make_h(), want="gradient")
        session.settle(step, make_h(1))
    if close:
        session.close()


def one_step(session: Any, seed: int = 1) -> None:
    z = session.encode(0, make_h(), want="gradient")
    session.settle(
        0, np.random.default_rng(seed).standard_normal(z.shape, dtype=np.float32), quiet=True
    )


def test_the_last_session_of_a_site_counts(host: BackboneHost) -> None:
    lost, again = open_site(host, SGD), open_site(host, SGD)
    one_step(lost)
    one_step(again, seed=2)
    again.close()
    lost.close()  # the server notices the lost one late
    got = host.collect("v")["s"]
    only = open_site(host, SGD)
    one_step(only, seed=2)
    for name, value in host.collect("v")["s"].items():  # also while the session is still open
        np.testing.assert_array_equal(value, got[name])
    only.close()
    assert host.collect("v") == {}


def test_who_took_no_step_has_no_delta(host: BackboneHost) -> None:
    session = open_site(host, ADAMW)
    session.encode(0, make_h())
    session.encode(1, make_h(), want="gradient")
    session.close()
    session.close()
    assert host.collect("v") == {}
    open_site(host, shared(1.0)).close()
    assert host.collect("v") == {}


def test_memory_is_bounded_and_freed(host: BackboneHost) -> None:
    backbone = host.backbone
    part = host._versions["v"][0]
    one = copy_bytes(trained_at(part, Cut(1, 3)), ADAMW)
    delta_bytes = one // 6
    small = BackboneHost(backbone, training_bytes=2 * one)
    small.publish("v", packed(backbone))
    sites = [open_site(small, ADAMW, s) for s in "xy"]
    with pytest.raises(OverloadedError, match="come back"):
        open_site(small, ADAMW, "z")
    open_site(small, None, "z")
    for session in sites:
        one_step(session)
        session.close()
    assert small._trainees.held_bytes == 2 * delta_bytes
    open_site(small, ADAMW, "z").close()
    assert small._trainees.held_bytes == 2 * delta_bytes
    for i in range(MAX_VERSIONS):
        small.publish(f"v{i}", packed(backbone))
    assert small._trainees.held_bytes == 0
    with pytest.raises(RefusedError, match="'v' is not here"):
        small.collect("v")


def test_publishing_a_version_again_drops_what_was_trained_on_it(host: BackboneHost) -> None:
    one_step(open_site(host, SGD))
    host.publish("v", packed(host.backbone))
    assert host.collect("v") == {}


def test_one_half_of_lora(host: BackboneHost) -> None:
    for half, other in (("A", "B"), ("B", "A")):
        one_step(open_site(host, SGD.model_copy(update={"lora": half})))
        names = host.collect("v")["s"].keys()
        assert names
        assert not any(f".lora_{other}." in n for n in names)


def test_a_gradient_that_is_not_finite_changes_nothing(host: BackboneHost) -> None:
    session = open_site(host, SGD)
    before = session.encode(0, make_h(), want="gradient")
    with pytest.raises(EncoderError, match="not finite"):
        session.settle(0, np.full((2, 5, 24), 3e38, np.float32), quiet=True)
    np.testing.assert_array_equal(session.encode(1, make_h()), before)
    assert host.collect("v") == {}


def test_clip_norm(host: BackboneHost) -> None:
    one_step(open_site(host, SGD.model_copy(update={"clip_norm": 0.5})))
    squares = sum(float((d**2).sum()) for d in host.collect("v")["s"].values())
    assert squares**0.5 == pytest.approx(0.5 * RATE, rel=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter", "prompt"])
def test_other_modules_train_and_the_backbone_stays(kind: Any, vit: Backbone) -> None:
    backbone = vit
    # The hidden states that come hold no tokens of a prompt: one takes the place of the first of theirs.
    spec = ModuleSpec(
        classes=SPEC.classes, kind=kind, prompt_tokens=1, deep_prompt=kind == "prompt"
    )
    start = module.initial(backbone, spec, seed=1)
    bare = ModuleSpec(classes=SPEC.classes, kind="classifier")
    host = BackboneHost(backbone)
    host.publish("bare", packed(backbone, bare, {}))
    host.publish("v", packed(backbone, spec, start))

    def answers() -> list[np.ndarray]:
        return [
            host.open(grant(backbone, Cut(2, 4), version=v)).encode(0, make_h())
            for v in ("bare", "v")
        ]

    before = answers()
    session = open_site(host, ADAMW, cut="2,4")
    for step in range(2):
        z = session.encode(step, make_h(), want="gradient")
        session.settle(step, np.ones_like(z))
    assert np.abs(session.encode(9, make_h()) - before[1]).max() > 1e-3
    delta = host.collect("v")["s"]
    assert delta.keys() == module.server_names(backbone, spec, Cut(2, 4))
    for got, wanted in zip(answers(), before, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_what_a_session_may_not_do(host: BackboneHost) -> None:
    prompt = ModuleSpec(classes=("a", "b"), kind="prompt")
    host.publish("p", packed(host.backbone, prompt, {}))
    with pytest.raises(RefusedError, match="no tensors to train"):
        host.open(grant(host.backbone, Cut(1, 3), version="p", training=SGD))
    frozen, hosted = open_site(host, None), open_site(host, SGD)
    assert (frozen.trains, hosted.trains) == (False, True)
    for call in (
        lambda: frozen.settle(0, make_h(), quiet=True),
        lambda: frozen.encode(0, make_h(), want="probes"),
        lambda: hosted.encode(0, make_h(), want="probes"),
    ):
        with pytest.raises(RefusedError):
            call()
    for session in (frozen, hosted):
        with pytest.raises(ProtocolError, match="step 0 is not held"):
            session.settle(0, np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("family", "training"),
    [("vit", None), ("vit", SGD), ("vit", shared(0.5)), ("bert", None)],
    ids=["frozen", "hosted", "shared", "text"],
)
def test_a_graph_is_counted_with_what_it_really_holds(
    tiny: dict[str, Path], family: str, training: EncoderTraining | None
) -> None:
    """Against the storages that the kept graph itself refers to, found by walking it."""
    host = BackboneHost(Backbone.find(str(tiny[family])))
    host.publish("v", packed(host.backbone))
    session = open_site(host, training)
    # A text long enough for its mask to weigh something.
    tokens = 5 if family == "vit" else 64
    counted = session.graph_bytes(2, tokens)
    weights = {p.untyped_storage().data_ptr() for p in session._part.model.parameters() if not p.is_meta}  # fmt: skip
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    h_BTD = np.ones((2, tokens, host.backbone.width), np.float32)
    mask_BT = None if family == "vit" else np.arange(tokens) < np.array([[9], [40]])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        z = session.encode(0, h_BTD, mask_BT, want="gradient")
    real = sum(seen.values())
    # Tensors of a size of their own (masks, weights of the moment) are counted for each sample; ends once or twice.
    assert 0.95 * real <= counted <= 1.35 * real + 4 * h_BTD.nbytes + z.nbytes
    # Many times the activations at the cut, which is what used to be counted.
    assert counted > 10 * h_BTD.nbytes
    session.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_huge_gradient_does_not_wreck_the_copy_of_all(
    host: BackboneHost, optimizer: Any
) -> None:
    training = shared(0.5).model_copy(update={"optimizer": optimizer})
    honest, hostile = (open_site(host, training, site=s) for s in ("honest", "hostile"))
    for step in range(8):
        z = honest.encode(step, make_h(step), want="gradient")
        honest.settle(step, np.ones_like(z) / z.size)
    before = {n: v.clone() for n, v in honest._tensors._values.items()}
    z = hostile.encode(0, make_h(), want="gradient")
    with pytest.raises(EncoderError, match=r"has length .* nothing was trained with it"):
        hostile.settle(0, np.full_like(z, 1e11))
    assert all(torch.equal(v, before[n]) for n, v in honest._tensors._values.items())
    hostile.close()
    z = honest.encode(9, make_h(9), want="gradient")
    honest.settle(9, np.ones_like(z) / z.size)
    assert np.isfinite(honest.encode(10, make_h())).all()
    honest.close()
