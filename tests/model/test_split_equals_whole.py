"""The headline test: placement never changes the function, bit for bit in-process on CPU in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part
from peft import PeftModel
from tests.model.conftest import CONFIGS

CUTS = ["0,4", "1,3", "2,2", "0,0", "4,4", "0,2", "2,4", "3,4"]
SPEC = ModuleSpec(classes=("a", "b", "c"), rank=3, alpha=6)


def make_batch(family: str, *, padded: bool = True) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """(inputs, mask, labels) of a batch of five; texts are padded to different lengths."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.tensor([0, 2, 1, 1, 0])
    if Backbone_kind(family) == "image":
        return {"pixel_values": torch.randn(5, 3, 16, 16, generator=generator)}, None, labels
    ids = torch.randint(3, 50, (5, 9), generator=generator)
    if not padded:
        return {"input_ids": ids}, None, labels
    mask = torch.arange(9)[None, :] < torch.tensor([9, 4, 7, 2, 9])[:, None]
    ids = ids.where(mask, torch.tensor(1))
    return {"input_ids": ids, "attention_mask": mask.long()}, mask, labels


def Backbone_kind(family: str) -> str:  # noqa: N802
    return "image" if "image_size" in CONFIGS[family][2] else "text"


def trained_start(backbone: Backbone) -> module.ModuleTensors:
    """A module away from its zeros, so that every tensor has a gradient."""
    tensors = module.initial(backbone, SPEC, seed=1)
    generator = torch.Generator().manual_seed(3)
    return {
        n: (t + 0.1 * torch.randn(t.shape, generator=generator).numpy()).astype("float32")
        for n, t in tensors.items()
    }


def whole_model(backbone: Backbone, tensors: module.ModuleTensors, folder: Path) -> PeftModel:
    """transformers' own model with the module loaded by PEFT itself: no fedsplit code in its forward."""
    module.export(folder, backbone, SPEC, tensors)
    model_class = getattr(transformers, backbone.family.model_class)
    whole = model_class.from_pretrained(backbone.path, num_labels=len(SPEC.classes))
    return PeftModel.from_pretrained(whole, folder, is_trainable=True).eval()


def whole_step(whole: PeftModel, inputs: dict[str, Any], labels: torch.Tensor) -> dict[str, Any]:
    """Loss, gradients and the weights after one AdamW step of the whole model, by the module's names."""
    trainable = {
        n.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p
        for n, p in whole.named_parameters()
        if p.requires_grad
    }
    return step(trainable, whole(**inputs).logits, labels)


def step(trainable: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainable.items()}
    optimizer.step()
    weights = {n: p.detach().clone() for n, p in trainable.items()}
    return {"logits": logits.detach(), "loss": loss.detach(), "grads": grads, "weights": weights}


def split_step(
    model: SplitModel, inputs: dict[str, Any], mask: Any, labels: torch.Tensor
) -> dict[str, Any]:
    return step(module.parameters(model.part), model(inputs, mask), labels)


def assert_same(split: dict[str, Any], whole: dict[str, Any], *, tolerance: float) -> None:
    """Equal loss, logits, and every gradient and weight that the device trains."""
    close = dict(rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(split["logits"], whole["logits"], **close)
    torch.testing.assert_close(split["loss"], whole["loss"], **close)
    assert split["grads"]
    for kind in ("grads", "weights"):
        for name, value in split[kind].items():
            torch.testing.assert_close(value, whole[kind][name], **close, msg=lambda m, n=name: f"{n}: {m}")


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
def test_text_without_padding_needs_no_mask(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
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
