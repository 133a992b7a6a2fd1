"""The encoder without a wire against the real stream: values, bytes, steps, and what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedsplit
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import EncoderTraining, Grant
from fedsplit.core.errors import ProtocolError, RefusedError, UnreachableError
from fedsplit.core.orders import Stream
from fedsplit.experiment.memo import Memo
from fedsplit.experiment.near_encoder import Effect, NearEncoder, NearHost
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.training.site_settings import SiteSettings
from fedsplit.transport import tokens
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import BackboneHost

KEY = b"k" * 32
SITE = SiteSettings.from_node({"site": "a"}, node_id=1)
SPEC = ModuleSpec(classes=("a", "b"), rank=2, alpha=4)


def packed(backbone: Backbone, *, trained: bool, seed: int = 0) -> bytes:
    tensors = module.initial(backbone, SPEC, seed=seed)
    own = {n: tensors[n] for n in module.server_names(backbone, SPEC)}
    if trained:
        rng = np.random.default_rng(seed)
        own = {n: rng.normal(0, 0.1, t.shape).astype(np.float32) for n, t in own.items()}
    return module.pack(SPEC, own)


@pytest.fixture(scope="module")
def host(tiny: dict[str, Path]) -> BackboneHost:
    backbone = Backbone.find(str(tiny["bert"]))
    host = BackboneHost(backbone)
    host.publish("run/1", packed(backbone, trained=True))
    return host


def stream(host: BackboneHost, cut: tuple[int, int] = (1, 3), **other: Any) -> Stream:
    grant = Grant(
        run="run", site="a", task="t", round=1, a=cut[0], b=cut[1], version="run/1",
        backbone_sha256=host.backbone.sha256, fedsplit_version=fedsplit.__version__, max_batch=8, max_tokens=64,
        max_steps=100,
    ).model_copy(update=other)  # fmt: skip
    token = tokens.sign(grant, KEY, 60.0)
    return Stream(address="near", token=token, grant=grant, tls=False, ca_file="")


def near(
    host: BackboneHost, memo: Memo | None = None, codec: str = "fp32", **other: Any
) -> NearEncoder:
    near_host = NearHost(host, memo)
    near_host.publish("run/1", packed(host.backbone, trained=True))
    return near_host.dial(stream(host, **other), RunConfig.of(codec=codec), SITE)


def activations(samples: int = 5, tokens: int = 7) -> np.ndarray:
    rng = np.random.default_rng(samples)
    return rng.normal(size=(samples, tokens, 24)).astype(np.float32)


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
@pytest.mark.parametrize("cut", [(1, 3), (0, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_wire_and_the_short_way_agree(
    host: BackboneHost, codec: str, cut: tuple[int, int], masked: bool
) -> None:
    h = activations()
    mask = None
    if masked:
        mask = np.ones(h.shape[:2], dtype=bool)
        mask[:, 5:] = False
    how = stream(host, cut)
    rng = np.random.default_rng(1)
    with (
        EncoderServer(host, key=KEY) as server,
        StreamEncoder(server.address, how.token, how.grant, codec=codec) as far,
        near(host, codec=codec, cut=cut) as here,
    ):
        for step, want in enumerate(("output", "gradient", "output"), 1):
            z_far = far.encode(step, h, mask, want=want)
            z_here = here.encode(step, h, mask, want=want)
            assert np.array_equal(z_far, z_here)
            assert z_here.flags.writeable
            if want == "gradient":
                dz = rng.normal(size=z_far.shape).astype(np.float32)
                assert np.array_equal(far.settle(step, dz), here.settle(step, dz))
        assert (far.steps, far.payload_up, far.payload_down) == (
            here.steps,
            here.payload_up,
            here.payload_down,
        )
        assert far.bytes_up == here.bytes_up
        # The real session's id is random, and not always as many digits long.
        digits = [len(str(encoder.welcome.session)) for encoder in (far, here)]
        assert far.bytes_down - digits[0] == here.bytes_down - digits[1]


def test_bytes_of_a_message_in_several_frames(host: BackboneHost) -> None:
    h = np.zeros((120, 64, 24), dtype=np.float32)  # 720 kB: two frames
    how = stream(host, max_batch=120)
    with (
        EncoderServer(host, key=KEY) as server,
        StreamEncoder(server.address, how.token, how.grant) as far,
        near(host, max_batch=120) as here,
    ):
        far.encode(1, h)
        here.encode(1, h)
        assert far.bytes_up == here.bytes_up
        assert far.bytes_down - len(str(far.welcome.session)) == here.bytes_down - 19


def test_refusals_are_those_of_the_wire(host: BackboneHost) -> None:
    with pytest.raises(RefusedError, match="leaves the encoder nothing to run"):
        near(host, cut=(3, 3))
    with near(host) as encoder:
        with pytest.raises(RefusedError, match="the token allows 8 samples"):
            encoder.encode(1, activations(9))
        with pytest.raises(ProtocolError, match="NaN"):
            encoder.encode(2, np.full((1, 2, 24), np.nan, dtype=np.float32))
    with pytest.raises(UnreachableError, match="closed"):
        encoder.encode(3, activations())
    with (
        near(host, codec="fp16") as encoder,
        pytest.raises(ProtocolError, match="codec=fp32"),
    ):
        encoder.encode(1, np.full((1, 2, 24), 1e6, dtype=np.float32))
    with near(host, max_steps=1) as encoder:
        encoder.encode(1, activations())
        with pytest.raises(RefusedError, match="allows 1 steps"):
            encoder.encode(2, activations())


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_what_is_remembered_is_the_same_and_counted_as_moved(
    host: BackboneHost, codec: str
) -> None:
    memo = Memo()
    h = activations(6)
    with near(host, codec=codec) as plain:
        wanted = plain.encode(1, h)
    with near(host, memo, codec) as first:
        a = first.encode(1, h[:4])
        assert (memo.hits, memo.misses) == (0, 4)
        b = first.encode(2, h[[5, 0, 4, 3]])
        assert (memo.hits, memo.misses) == (2, 6)
    # Another batch adds in another order: equal up to that, and exactly what was told the first time.
    np.testing.assert_allclose(
        np.concatenate([a, b[[2, 0]]]), wanted, atol=1e-5 if codec == "fp32" else 2e-2
    )
    assert np.array_equal(b[1], a[0])
    with near(host, memo, codec) as second:
        again = second.encode(1, h)
        assert memo.misses == 6
    assert plain.bytes_up == second.bytes_up
    assert plain.bytes_down == second.bytes_down
    again[:] = 0.0
    with near(host, memo, codec) as third:
        assert np.any(third.encode(1, h))  # what was kept is not the caller's


@pytest.mark.parametrize("leave", [1, 2, 3, 4])
def test_what_leaves_early_is_remembered_no_further(leave: int, tiny: dict[str, Path]) -> None:
    """The module begins at block 2, so the memo has what is in front of it, or less."""
    h = activations(4)
    training = EncoderTraining(mode="hosted", learning_rate=0.1, leave=leave)
    backbone = Backbone.find(str(tiny["vit"]))
    spec = ModuleSpec(classes=("a",), kind="full", last_blocks=2)
    tensors, names = module.initial(backbone, spec, seed=0), module.server_names(backbone, spec)
    found = []
    for memo in (None, Memo()):
        host = BackboneHost(backbone)
        near_host = NearHost(host, memo)
        near_host.publish(
            "run/1", module.pack(spec, {n: tensors[n] for n in tensors if n in names})
        )
        with near_host.dial(stream(host, (0, 4), training=training), RunConfig(), SITE) as encoder:
            z = encoder.encode(1, h, want="gradient")
            dh = encoder.settle(1, np.ones_like(z))
            found.append((z, dh, encoder.encode(2, h)))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_else_is_taken_for_the_same(host: BackboneHost) -> None:
    memo, h = Memo(), activations(2)
    mask = np.ones(h.shape[:2], dtype=bool)
    mask[:, 4:] = False
    with near(host, memo) as encoder:
        encoder.encode(1, h)
        encoder.encode(2, h, np.ones_like(mask))  # no mask and a whole one are the same
        assert (memo.hits, memo.misses) == (2, 2)
        encoder.encode(3, h, mask)
        encoder.encode(4, h[:, :5])
        assert (memo.hits, memo.misses) == (2, 6)
        encoder.encode(5, h, want="gradient")  # its graph is wanted
        assert (memo.hits, memo.misses) == (2, 6)
    with near(host, memo, cut=(1, 4)) as encoder:
        encoder.encode(1, h)
    assert (memo.hits, memo.misses) == (2, 8)


def test_only_what_acts_within_the_cut_makes_another_version(host: BackboneHost) -> None:
    backbone = host.backbone
    blocks = f"{backbone.family.base}.{backbone.family.blocks}"

    def effect(data: bytes, cut: str = "1,3") -> bytes:
        return Effect(data, blocks=blocks).digest(Cut.parse(cut))

    untrained = [effect(packed(backbone, trained=False, seed=s)) for s in (0, 1)]
    trained = [effect(packed(backbone, trained=True, seed=s)) for s in (0, 1)]
    bare = effect(module.pack(ModuleSpec(classes=("a",), kind="classifier"), {}))
    assert untrained[0] == untrained[1] == bare
    assert len({bare, *trained}) == 3
    # A tail that trains is not the encoder's.
    tensors = module.initial(backbone, SPEC, seed=0)
    own = {n: tensors[n] for n in module.server_names(backbone, SPEC)}
    tail = {n: t + 1 if f"{blocks}.3." in n else t for n, t in own.items()}
    assert effect(module.pack(SPEC, tail)) == bare
    assert effect(module.pack(SPEC, tail), "1,4") != bare


def test_adapters_that_add_nothing_are_no_difference(tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    spec = ModuleSpec(classes=("a", "b"), kind="adapter", adapter_width=4)
    blocks = f"{backbone.family.base}.{backbone.family.blocks}"
    digests = []
    for seed, moved in ((0, False), (1, False), (1, True)):
        tensors = module.initial(backbone, spec, seed=seed)
        own = {n: tensors[n] for n in module.server_names(backbone, spec)}
        if moved:
            own = {n: t + 0.1 if n.endswith("adapter_up.bias") else t for n, t in own.items()}
        digests.append(Effect(module.pack(spec, own), blocks=blocks).digest(Cut(1, 3)))
    assert digests[0] == digests[1] != digests[2]


def test_the_memo_is_bounded_and_keeps_what_is_used() -> None:
    memo = Memo(100)
    value = np.zeros(10, dtype=np.float32)  # 40 bytes
    for key in (b"a", b"b"):
        memo.keep(key, value)
    memo.find([b"a"])
    memo.keep(b"c", value)
    assert [v is not None for v in memo.find([b"a", b"b", b"c"])] == [True, False, True]
    memo.keep(b"d", np.zeros(1000, dtype=np.float32))
    memo.keep(b"a", value)
    assert [v is not None for v in memo.find([b"d"])] == [False]
    assert sum(v.nbytes for v in memo._kept.values()) + memo._room == 100
