"""The headline test: placement never changes the function, bit for bit in-process on CPU in fp32.

Bit for bit at widths that are multiples of 8, as the tiny backbones' 24 is: at others a processor's kernels may sum the
rest of a row in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import FAMILIES
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part
from tests.kept import frozen_weights
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
from tests.tiny import CONFIGS, save

TEXTS = [name for name in CONFIGS if FAMILIES[name].kind == "text"]
# Variants of LoRA, adapters and full modules run the same code in every family: one of each sort is enough for them.
VARIANTS = ("low rank", "last blocks", "last adapters", "full blocks")
CASES = [(f, k) for f in CONFIGS for k in SPECS if k not in VARIANTS or f in ("vit", "roberta")]


@dataclass
class Compared:
    """One module on the whole model and on the split one."""

    backbone: Backbone
    spec: ModuleSpec
    folder: Path

    def check(self, batch: Any, cuts: Sequence[str], *, tolerance: float = 0.0) -> None:
        """Loss, logits, every gradient and one step of AdamW at these cuts."""
        tensors = away_from_zero(self.backbone, self.spec)
        inputs, mask, labels = batch
        model = reference(self.backbone, self.spec, tensors, self.folder)
        # Of another size than the backbone's own, transformers wants to be told; DINOv2 always interpolates.
        pixels = inputs.get("pixel_values")
        resized = pixels is not None and pixels.shape[-1] != self.backbone.config.image_size
        told = resized and self.backbone.family.embed_kwargs
        whole = step(model.trainable, model(inputs | dict(told or ())), labels)

        server = server_part(self.backbone, self.spec, weights=frozen_weights(self.backbone))
        module.load(server, tensors)
        for cut in cuts:
            place = Cut.parse(cut)
            device = device_part(
                self.backbone, place, self.spec, weights=frozen_weights(self.backbone)
            )
            module.load(device, tensors)
            encoder = LocalEncoder(server, place)
            split = split_step(SplitModel(device, place, encoder), inputs, mask, labels)
            assert_same(split, whole, tolerance=tolerance)
            wanted = module.trained_names(self.backbone, self.spec, place, head=True)
            assert split["grads"].keys() == wanted
            assert encoder.kept_steps == 0


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_split_equals_whole_to_the_last_bit_at_a_width_of_24(
    family: str, kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA at every sort of cut, the other kinds at three."""
    cuts = CUTS if kind == "lora" else ("0,4", "1,3", "2,2")
    compared = Compared(Backbone.find(str(tiny[family])), SPECS[kind], tmp_path)
    compared.check(make_batch(family), cuts)


def test_a_decoder_scores_its_last_token_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    """transformers scores all tokens; a processor's kernels sum these few columns otherwise for many rows than for one."""
    spec = replace(SPECS["lora"], classes=("a", "b", "c"))
    compared = Compared(Backbone.find(str(tiny["llama"])), spec, tmp_path)
    compared.check(make_batch("llama"), ("0,4", "1,3"), tolerance=1e-5)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_split_equals_whole_within_rounding_at_a_width_of_20(family: str, tmp_path: Path) -> None:
    path = save(tmp_path, family, hidden_size=20, num_attention_heads=2)
    compared = Compared(Backbone.find(str(path)), SPECS["lora"], tmp_path / "peft")
    compared.check(make_batch(family), ("0,4", "1,3"), tolerance=1e-4)


@pytest.mark.parametrize("kind", ["lora", "prompt", "deep prompt"])
@pytest.mark.parametrize("family", CONFIGS)
def test_padding_on_the_left_and_other_numbers_of_patches(
    family: str, kind: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    compared = Compared(Backbone.find(str(tiny[family])), SPECS[kind], tmp_path)
    compared.check(make_batch(family, left=True, side=24), ("0,4", "1,3"))


@pytest.mark.parametrize("left", [False, True])
def test_the_mean_over_the_tokens_that_are_no_padding(left: bool, tmp_path: Path) -> None:
    path = save(tmp_path, "modernbert", classifier_pooling="mean")
    compared = Compared(Backbone.find(str(path)), SPECS["lora"], tmp_path / "peft")
    compared.check(make_batch("modernbert", left=left), ("0,4", "1,3"))


@pytest.mark.parametrize("family", TEXTS)
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
