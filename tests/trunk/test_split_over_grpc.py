"""Split equals whole over the real wire: gRPC on loopback with fp32 moves bits and changes none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ProtocolError, RefusedError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.transport.server import EncoderServer
from fedsplit.trunk.host import MAX_VERSIONS, BackboneHost
from tests.model.whole import (
    SPEC,
    assert_same,
    make_batch,
    split_model,
    split_step,
    trained_start,
    whole_model,
    whole_step,
)
from tests.tiny import CONFIGS
from tests.trunk.wire import dial, grant, packed, serving


@pytest.fixture(scope="module")
def servers(tiny: dict[str, Path]) -> Iterator[dict[str, EncoderServer]]:
    """family -> a running encoder that has the trained start published as version "v"."""
    with ExitStack() as running:
        yield {
            family: running.enter_context(serving(Backbone.find(str(path))))
            for family, path in tiny.items()
        }


@pytest.mark.parametrize("cut", ["0,4", "1,3", "2,4", "0,2"])
@pytest.mark.parametrize("family", CONFIGS)
def test_split_over_grpc_equals_whole(
    family: str, cut: str, tiny: dict[str, Path], servers: dict[str, EncoderServer], tmp_path: Path
) -> None:
    backbone, place = Backbone.find(str(tiny[family])), Cut.parse(cut)
    tensors = trained_start(backbone)
    inputs, mask, labels = make_batch(family)
    whole = whole_step(whole_model(backbone, tensors, tmp_path), inputs, labels)
    with dial(servers[family], grant(backbone, place)) as stream:
        split = split_step(split_model(backbone, place, tensors, stream), inputs, mask, labels)
    assert_same(split, whole, tolerance=0.0)


def test_fp16_is_close_and_half_the_bytes(
    tiny: dict[str, Path], servers: dict[str, EncoderServer], tmp_path: Path
) -> None:
    backbone, place = Backbone.find(str(tiny["vit"])), Cut(1, 3)
    tensors = trained_start(backbone)
    inputs, mask, labels = make_batch("vit")
    whole = whole_step(whole_model(backbone, tensors, tmp_path), inputs, labels)
    sizes = {}
    for codec in ("fp32", "fp16"):
        with dial(servers["vit"], grant(backbone, place), codec) as stream:
            logits = split_model(backbone, place, tensors, stream)(inputs, mask)
            sizes[codec] = stream.payload_up
    torch.testing.assert_close(logits.detach(), whole["logits"], rtol=0.02, atol=0.02)
    assert not torch.equal(logits.detach(), whole["logits"])
    assert sizes["fp16"] * 2 == sizes["fp32"]


def test_refusals_name_both_sides(tiny: dict[str, Path], servers: dict[str, EncoderServer]) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    cases = {
        "backbone": grant(backbone, Cut(1, 3), backbone_sha256="0" * 64),
        "version": grant(backbone, Cut(1, 3), version="r/99"),
        "blocks": grant(backbone, Cut(1, 5)),
        "fedsplit": grant(backbone, Cut(1, 3), fedsplit_version="0.0.9"),
    }
    said = {}
    for name, what in cases.items():
        with pytest.raises(RefusedError) as caught:
            dial(servers["vit"], what)
        said[name] = str(caught.value)
    assert "000000000000" in said["backbone"]
    assert backbone.sha256[:12] in said["backbone"]
    assert "r/99" in said["version"]
    assert "block 4" in said["blocks"]
    assert "0.0.9" in said["fedsplit"]
    assert __version__ in said["fedsplit"]


def test_old_versions_go_and_open_sessions_stay(tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    host = BackboneHost(backbone)
    host.publish("v0", packed(backbone))
    session = host.open(grant(backbone, Cut(1, 3), version="v0"))
    for i in range(1, MAX_VERSIONS + 1):
        host.publish(f"v{i}", packed(backbone))
    assert host.capabilities().versions == tuple(f"v{i}" for i in range(1, MAX_VERSIONS + 1))
    with pytest.raises(RefusedError, match="v0"):
        host.open(grant(backbone, Cut(1, 3), version="v0"))
    assert session.encode(1, torch.zeros(1, 17, 24).numpy()).shape == (1, 17, 24)


def test_publish_refuses_what_does_not_fit(tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    host = BackboneHost(backbone)
    names = module.server_names(backbone, SPEC)
    tensors = {n: t for n, t in trained_start(backbone).items() if n in names}
    odd = dict(tensors)
    odd.pop(sorted(odd)[0])
    hostile = [b"", b"\0" * 64, b"\xff" * 9, packed(backbone)[:-5], module.pack(SPEC, odd)]
    for data in hostile:
        with pytest.raises(ProtocolError):
            host.publish("v", data)
    assert host.capabilities().versions == ()
