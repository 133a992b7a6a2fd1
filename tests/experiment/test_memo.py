"""Sessions that train behind remembered blocks against the same sessions without a memo."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import fedsplit
from fedsplit.core import directions
from fedsplit.core.config import RunConfig
from fedsplit.core.encoder import Array, EncoderTraining, Grant
from fedsplit.core.orders import Stream
from fedsplit.experiment.memo import Memo
from fedsplit.experiment.near_encoder import NearHost
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.training.site_settings import SiteSettings
from fedsplit.trunk.host import BackboneHost

SITE = SiteSettings.from_node({"site": "a"}, node_id=1)
SPEC = ModuleSpec(classes=("a", "b"), rank=2, alpha=4, last_blocks=2)
LAST = 4


def near_host(tiny: dict[str, Path], memo: Memo | None) -> NearHost:
    backbone = Backbone.find(str(tiny["vit"]))
    host = NearHost(BackboneHost(backbone), memo)
    tensors = module.initial(backbone, SPEC, seed=0)
    rng = np.random.default_rng(0)
    own = {
        n: rng.normal(0, 0.1, tensors[n].shape).astype(np.float32)
        for n in sorted(module.server_names(backbone, SPEC))
    }
    host.publish("run/1", module.pack(SPEC, own))
    return host


def stream(host: NearHost, training: EncoderTraining | None) -> Stream:
    grant = Grant(
        run="run", site="a", task="t", round=1, a=0, b=LAST, version="run/1",
        backbone_sha256=host.host.backbone.sha256, fedsplit_version=fedsplit.__version__, max_batch=8,
        max_tokens=64, max_steps=100, training=training,
    )  # fmt: skip
    return Stream(address="near", token="", grant=grant, tls=False, ca_file="")


def batch(host: NearHost) -> Array:
    width = host.host.backbone.width
    return np.random.default_rng(1).normal(size=(3, 5, width)).astype(np.float32)


def trained(
    host: NearHost, training: EncoderTraining, *, wants_dh: bool
) -> tuple[list[Any], dict[str, Any]]:
    """What two steps on the same samples answer, and what they trained."""
    answers, h = [], batch(host)
    with host.dial(stream(host, training), RunConfig(), SITE) as encoder:
        for step in (1, 2):
            if training.mode == "zeroth-order":
                z = encoder.encode(step, h, want="probes")
                points = directions.points(training.estimator, training.queries)
                encoder.settle(step, np.arange(len(points), dtype=np.float32))
            else:
                z = encoder.encode(step, h, want="gradient")
                dz = np.ones_like(z)
                if wants_dh:
                    answers.append(encoder.settle(step, dz))
                else:
                    encoder.settle(step, dz, quiet=True)
            answers.append(z)
        counted = (encoder.bytes_up, encoder.bytes_down)
    return [*answers, counted], host.collect("run/1")["a"]


@pytest.mark.parametrize(
    ("mode", "wants_dh"), [("hosted", True), ("hosted", False), ("zeroth-order", False)]
)
def test_training_behind_the_memo_is_the_same(
    tiny: dict[str, Path], mode: Literal["hosted", "zeroth-order"], wants_dh: bool
) -> None:
    training = EncoderTraining(mode=mode, learning_rate=0.01, queries=2)
    memo = Memo()
    wanted, delta = trained(near_host(tiny, None), training, wants_dh=wants_dh)
    got, delta_got = trained(near_host(tiny, memo), training, wants_dh=wants_dh)
    # The second step's samples came from the memo.
    assert (memo.hits, memo.misses) == (3, 3)
    assert got[-1] == wanted[-1]
    for a, b in zip(wanted[:-1], got[:-1], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert delta.keys() == delta_got.keys() != set()
    for name, change in delta.items():
        assert np.any(change)
        np.testing.assert_allclose(delta_got[name], change, rtol=1e-4, atol=1e-6)


def test_a_trained_module_shares_the_blocks_in_front_of_it_with_a_bare_one(
    tiny: dict[str, Path],
) -> None:
    memo = Memo()
    host = near_host(tiny, memo)
    h = batch(host)
    with near_host(tiny, None).dial(stream(host, None), RunConfig(), SITE) as encoder:
        wanted = encoder.encode(1, h)
    with host.dial(stream(host, None), RunConfig(), SITE) as encoder:
        first = encoder.encode(1, h)
        # Asked for as a whole, then by the blocks in front; both were new.
        assert (memo.hits, memo.misses) == (0, 6)
        assert np.array_equal(encoder.encode(2, h), first)
        assert (memo.hits, memo.misses) == (3, 6)
    np.testing.assert_allclose(first, wanted, rtol=1e-5, atol=1e-6)
    with host.dial(
        stream(host, EncoderTraining(mode="hosted", learning_rate=0.01)), RunConfig(), SITE
    ) as encoder:
        encoder.encode(1, h, want="gradient")
        assert (memo.hits, memo.misses) == (6, 6)
