"""The headline test: placement never changes the function, bit for bit in-process on CPU in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.encoder import LocalEncoder
from fedsplit.model.split import SplitModel, device_part, server_part
from tests.model.whole import (
    CUTS,
    SPEC,
    assert_same,
    make_batch,
    split_step,
    trained_start,
    whole_model,
    whole_step,
)
from tests.tiny import CONFIGS


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_split_equals_whole(family: str, cut: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    backbone = Backbone.find(str(tiny[family]))
    place = Cut.parse(cut)
    tensors = trained_start(backbone)
    inputs, mask, labels = make_batch(family)
    whole = whole_step(whole_model(backbone, tensors, tmp_path), inputs, labels)

    device, server = device_part(backbone, place, SPEC), server_part(backbone, SPEC)
    module.load(device, tensors)
    module.load(server, tensors)
    encoder = LocalEncoder(server, place)
    split = split_step(SplitModel(device, place, encoder), inputs, mask, labels)

    assert_same(split, whole, tolerance=0.0)
    assert encoder.kept_steps == 0
    blocks_trained = {n.split(".lora_")[0] for n in split["grads"] if ".lora_" in n}
    assert len(blocks_trained) == 2 * len(place.device_blocks(4))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_text_without_padding_needs_no_mask(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    backbone, place = Backbone.find(str(tiny[family])), Cut(1, 3)
    tensors = trained_start(backbone)
    inputs, mask, labels = make_batch(family, padded=False)
    whole = whole_step(whole_model(backbone, tensors, tmp_path), inputs, labels)
    device, server = device_part(backbone, place, SPEC), server_part(backbone, SPEC)
    module.load(device, tensors)
    module.load(server, tensors)
    split = split_step(SplitModel(device, place, LocalEncoder(server, place)), inputs, mask, labels)
    assert_same(split, whole, tolerance=0.0)


def test_device_holds_only_its_tensors(tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    part = device_part(backbone, Cut(1, 3), SPEC)
    held = {n for n, p in part.model.named_parameters() if not p.is_meta}
    assert any(n.startswith("vit.layers.0.") for n in held)
    assert not any(n.startswith(("vit.layers.1.", "vit.layers.2.")) for n in held)
    thinnest = device_part(backbone, Cut(0, 4), SPEC)
    held = {n for n, p in thinnest.model.named_parameters() if not p.is_meta}
    assert all(n.startswith(("vit.embeddings.", "classifier.")) for n in held)


def test_frozen_head_keeps_nothing_at_the_encoder(tiny: dict[str, Path]) -> None:
    backbone, place = Backbone.find(str(tiny["vit"])), Cut(1, 3)
    device, server = device_part(backbone, place, SPEC), server_part(backbone, SPEC)
    tensors = trained_start(backbone)
    module.load(device, tensors)
    module.load(server, tensors)
    module.freeze_head(device, place.a)
    encoder = LocalEncoder(server, place)
    inputs, mask, _ = make_batch("vit")
    logits = SplitModel(device, place, encoder)(inputs, mask)
    assert encoder.kept_steps == 0
    logits.sum().backward()
    trained = [n for n, p in module.parameters(device).items() if p.grad is not None]
    assert trained
    assert not any(n.startswith("vit.layers.0.") for n in trained)


def test_image_size_other_than_the_backbones(tiny: dict[str, Path], tmp_path: Path) -> None:
    backbone, place = Backbone.find(str(tiny["vit"])), Cut(1, 3)
    tensors = trained_start(backbone)
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    whole = whole_model(backbone, tensors, tmp_path)(**inputs, interpolate_pos_encoding=True).logits
    device, server = device_part(backbone, place, SPEC), server_part(backbone, SPEC)
    module.load(device, tensors)
    module.load(server, tensors)
    split = SplitModel(device, place, LocalEncoder(server, place))(inputs, None)
    torch.testing.assert_close(split, whole, rtol=0, atol=0)
