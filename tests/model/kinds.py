"""Every kind of module on transformers' own whole model, without fedsplit code in the forward pass.

LoRA goes on by PEFT itself; prompts and adapters by forward hooks that spell out what they do; a full module by
`load_state_dict`; merged deltas are added to the weights. Gradients come back by the module's names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors

# Four: with fewer columns a processor sums many rows otherwise than few (see the decoder of three classes).
CLASSES = ("a", "b", "c", "d")
LORA = ModuleSpec(classes=CLASSES, rank=3, alpha=6)
SPECS = {
    "lora": LORA,
    "low rank": replace(LORA, rank=2, max_rank=8),
    "last blocks": replace(LORA, last_blocks=2),
    "merged": replace(LORA, merged=True),
    "prompt": ModuleSpec(classes=CLASSES, kind="prompt", prompt_tokens=3),
    "deep prompt": ModuleSpec(classes=CLASSES, kind="prompt", prompt_tokens=3, deep_prompt=True),
    "adapter": ModuleSpec(classes=CLASSES, kind="adapter", adapter_width=5),
    "last adapters": ModuleSpec(classes=CLASSES, kind="adapter", adapter_width=5, last_blocks=1),
    "classifier": ModuleSpec(classes=CLASSES, kind="classifier"),
    "full": ModuleSpec(classes=CLASSES, kind="full"),
    "full blocks": ModuleSpec(classes=CLASSES, kind="full", last_blocks=4),
    "last full block": ModuleSpec(classes=CLASSES, kind="full", last_blocks=1),
}


def away_from_zero(backbone: Backbone, spec: ModuleSpec, *, seed: int = 3) -> ModuleTensors:
    """A module that does something with every tensor, so that each has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: (t + 0.1 * torch.randn(t.shape, generator=generator).numpy()).astype("float32")
        for n, t in module.initial(backbone, spec, seed=1).items()
    }


@dataclass
class Reference:
    """The whole model with a module: logits of transformers' inputs, and what trains."""

    forward: Callable[..., Any]
    trainable: dict[str, nn.Parameter]

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.forward(**inputs).logits
        return logits


def reference(
    backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors, folder: Path
) -> Reference:
    """The whole model with the module. `folder` takes what PEFT reads."""
    model_class = getattr(transformers, backbone.family.model_class)
    whole = model_class.from_pretrained(backbone.path, num_labels=len(spec.classes)).eval()
    if spec.kind in {"lora", "classifier"}:
        return _by_peft(backbone, spec, tensors, whole, folder)
    whole.requires_grad_(False)
    values = {n: torch.from_numpy(t) for n, t in tensors.items()}
    known = dict(whole.named_parameters())
    whole.load_state_dict({n: v for n, v in values.items() if n in known}, strict=False)
    added = {n: nn.Parameter(v.clone()) for n, v in values.items() if n not in known}
    base = getattr(whole, backbone.family.base)
    if spec.kind == "prompt":
        first = f"{backbone.family.base}.prompt.weight"
        _hook_prompt(backbone, base, added[first])
        _hook_prompts(whole, {n: p for n, p in added.items() if n != first})
    if spec.kind == "adapter":
        _hook_adapters(backbone, whole, added)
    trainable = {n: added[n] if n in added else known[n].requires_grad_() for n in tensors}
    tokens = spec.prompt_tokens if spec.kind == "prompt" else 0
    rotary = bool(backbone.family.rotary)
    return Reference(lambda **inputs: whole(**_widened(inputs, tokens, rotary=rotary)), trainable)


def _by_peft(
    backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors, whole: Any, folder: Path
) -> Reference:
    for name in [n for n in tensors if ".lora_merged." in n]:
        weight = whole.get_parameter(name.replace(".lora_merged.", "."))
        weight.data += torch.from_numpy(tensors[name])
    small = {n: t for n, t in tensors.items() if ".lora_merged." not in n}
    module.export(folder, backbone, replace(spec, merged=False), small)
    peft = PeftModel.from_pretrained(whole, folder, is_trainable=True).eval()
    names = {
        n.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): p
        for n, p in peft.named_parameters()
        if p.requires_grad
    }
    # A bare classifier's export carries LoRA that adds nothing.
    return Reference(peft, {n: p for n, p in names.items() if n in tensors})


def _hook_prompt(backbone: Backbone, base: Any, prompt_PD: Tensor) -> None:
    def insert(_: nn.Module, __: Any, h_BTD: Tensor) -> Tensor:
        prompt_BPD = prompt_PD[None].expand(len(h_BTD), -1, -1)
        return torch.cat([h_BTD[:, :1], prompt_BPD, h_BTD[:, 1:]], dim=1)

    getattr(base, backbone.family.embeddings).register_forward_hook(insert)
    last_norm = {"dinov2": "layernorm", "llama": "norm"}.get(backbone.family.model_type)
    if last_norm:
        # DINOv2 averages all tokens but the first, Llama counts the ids: the prompt's are not among them.
        tokens = len(prompt_PD)
        base.get_submodule(last_norm).register_forward_hook(
            lambda _, __, h_BTD: torch.cat([h_BTD[:, :1], h_BTD[:, 1 + tokens :]], dim=1)
        )


def _hook_prompts(whole: Any, added: dict[str, nn.Parameter]) -> None:
    def renew(prompt_PD: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any) -> Any:
            h_BTD, *rest = args
            prompt_BPD = prompt_PD[None].expand(len(h_BTD), -1, -1)
            first, others = h_BTD[:, :1], h_BTD[:, 1 + len(prompt_PD) :]
            return (torch.cat([first, prompt_BPD, others], dim=1), *rest)

        return hook

    for name, prompt_PD in added.items():
        block = whole.get_submodule(name.removesuffix(".prompt.weight"))
        block.register_forward_pre_hook(renew(prompt_PD))


def _hook_adapters(backbone: Backbone, whole: Any, added: dict[str, nn.Parameter]) -> None:
    def adapt(block: str) -> Callable[..., Tensor]:
        down, up = (
            (added[f"{block}.adapter_{way}.weight"], added[f"{block}.adapter_{way}.bias"])
            for way in ("down", "up")
        )

        def hook(_: nn.Module, __: Any, h_BTD: Tensor) -> Tensor:
            low = nn.functional.gelu(nn.functional.linear(h_BTD, *down))
            return h_BTD + nn.functional.linear(low, *up)

        return hook

    for block in {n.split(".adapter_")[0] for n in added}:
        whole.get_submodule(block).register_forward_hook(adapt(block))


def _widened(inputs: dict[str, Tensor], tokens: int, *, rotary: bool) -> dict[str, Tensor]:
    if not tokens or "attention_mask" not in inputs:
        return inputs
    if rotary:
        # transformers counts the ids, not what the hook made of them.
        length = inputs["input_ids"].shape[1] + tokens
        inputs = inputs | {"position_ids": torch.arange(length)[None]}
    mask_BT = inputs["attention_mask"]
    ones = torch.ones(len(mask_BT), tokens, dtype=mask_BT.dtype)
    # Where the tokens go, behind the first, which is padding where a text is padded on the left.
    wide = torch.cat([mask_BT[:, :1], ones, mask_BT[:, 1:]], dim=1)
    return inputs | {"attention_mask": wide}
