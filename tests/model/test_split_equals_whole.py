"""The headline test: placement never changes the function, bit for bit in-process on CPU in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.encoder import LocalEncoder
from fedsplit.model.parts import frozen_weights
from fedsplit.model.split import SplitModel, device_part, server_part
from tests.model.kinds import SPECS, away_from_zero, reference
from tests.model.whole import (
    CUTS,
    SPEC,
    assert_same,
    make_batch,
    split_step,
    step,
    trained_start,
    whole_model,
    whole_step,
)
from tests.tiny import CONFIGS

# Variants of LoRA and adapters run the same code in every family: one of each sort is enough for them.
VARIANTS = ("low rank", "last blocks", "last adapters")
CASES = [(f, k) for f in CONFIGS for k in SPECS if k not in VARIANTS or f in ("vit", "roberta")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_split_equals_whole(family: str, kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    """Loss, logits, every gradient and one step of AdamW; LoRA at every sort of cut, the other kinds at three."""
    backbone, spec = Backbone.find(str(tiny[family])), SPECS[kind]
    tensors = away_from_zero(backbone, spec)
    inputs, mask, labels = make_batch(family)
    model = reference(backbone, spec, tensors, tmp_path)
    whole = step(model.trainable, model(inputs), labels)

    server = server_part(backbone, spec, weights=frozen_weights(backbone))
    module.load(server, tensors)
    for cut in CUTS if kind == "lora" else ("0,4", "1,3", "2,2"):
        place = Cut.parse(cut)
        device = device_part(backbone, place, spec, weights=frozen_weights(backbone))
        module.load(device, tensors)
        encoder = LocalEncoder(server, place)
        split = split_step(SplitModel(device, place, encoder), inputs, mask, labels)
        assert_same(split, whole, tolerance=0.0)
        assert split["grads"].keys() == module.trained_names(backbone, spec, place, head=True)
        assert encoder.kept_steps == 0


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
