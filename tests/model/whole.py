"""The comparison behind "split equals whole": one step of the split model against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Encoder
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.families import FAMILIES
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part

CUTS = ["0,4", "1,3", "2,2", "0,0", "4,4", "0,2", "2,4", "3,4"]
SPEC = ModuleSpec(classes=("a", "b", "c", "d"), rank=3, alpha=6)


def make_batch(
    family: str, *, padded: bool = True, left: bool = False, side: int = 16
) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """(inputs, mask, labels) of a batch of five; texts are padded to different lengths, images have `side` pixels."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.tensor([0, 2, 1, 1, 0])
    if FAMILIES[family].kind == "image":
        return {"pixel_values": torch.randn(5, 3, side, side, generator=generator)}, None, labels
    ids = torch.randint(3, 50, (5, 9), generator=generator)
    if not padded:
        return {"input_ids": ids}, None, labels
    mask = torch.arange(9)[None, :] < torch.tensor([9, 4, 7, 2, 9])[:, None]
    mask = mask.flip(1) if left else mask
    ids = ids.where(mask, torch.tensor(1))
    return {"input_ids": ids, "attention_mask": mask.long()}, mask, labels


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
        n.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): p
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
    parameters = module.parameters(model.part).items()
    return step({n: p for n, p in parameters if p.requires_grad}, model(inputs, mask), labels)


def assert_same(split: dict[str, Any], whole: dict[str, Any], *, tolerance: float) -> None:
    """Equal loss, logits, and every gradient and weight that the device trains."""
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(split["logits"], whole["logits"], **close)
    torch.testing.assert_close(split["loss"], whole["loss"], **close)
    assert split["grads"]
    for kind in ("grads", "weights"):
        for name, value in split[kind].items():
            torch.testing.assert_close(
                value, whole[kind][name], **close, msg=lambda m, n=name: f"{n}: {m}"
            )


def split_model(
    backbone: Backbone, place: Cut, tensors: module.ModuleTensors, encoder: Encoder
) -> SplitModel:
    """A device at `place` that holds the module, before the encoder."""
    device = device_part(backbone, place, SPEC)
    module.load(device, tensors)
    return SplitModel(device, place, encoder)
