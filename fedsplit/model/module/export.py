"""The trained module as files, and back.

LoRA and a bare classifier go out in PEFT's format, `adapter_config.json` and `adapter_model.safetensors`, which
PEFT loads on the whole model. Prompts, adapters and full modules have no such format that fits them and go out
as `module.safetensors` by the whole model's names. `fedsplit.json` beside either says what it is and how inputs are
prepared for it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.aggregation import Tensors
from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.scores import Scale
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs, about_inputs, read_inputs
from fedsplit.model.layers import MERGED
from fedsplit.model.module import lora
from fedsplit.model.module.names import final_linear, shapes
from fedsplit.model.module.spec import MAX_WIDTH, ModuleSpec, ModuleTensors, about, read_about
from fedsplit.model.module.start import initial

ABOUT_FILE, PEFT_FILE, OWN_FILE = "fedsplit.json", "adapter_model.safetensors", "module.safetensors"
_PEFT_ROOT = "base_model.model."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def export(
    folder: Path,
    backbone: Backbone,
    spec: ModuleSpec,
    tensors: Tensors,
    *,
    inputs: Inputs = Inputs(),  # noqa: B008
) -> None:
    """Write the module to `folder`, with the settings by which inputs were prepared for it.

    LoRA: `PeftModel.from_pretrained(whole_model, folder)` loads it, merged deltas folded in (`fold_merged`).
    Every kind: `load_exported` reads it back.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if spec.merged:
        spec, tensors = fold_merged(spec, tensors)
    if _in_peft_format(spec):
        # A module without LoRA still is an adapter for PEFT, which wants a target: it gets LoRA that adds nothing.
        whole = dict(tensors) if spec.kind == "lora" else {**tensors, **_idle_lora(backbone, spec)}
        lora.save_config(folder, backbone, spec, whole)
        file, whole = folder / PEFT_FILE, {f"{_PEFT_ROOT}{n}": t for n, t in whole.items()}
    else:
        file, whole = folder / OWN_FILE, dict(tensors)
    contiguous = {n: np.ascontiguousarray(t) for n, t in whole.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    said = {
        "classes": list(spec.classes),
        "backbone_sha256": backbone.sha256,
        # A hint for whoever looks for it: the digest decides. A path of this machine says nothing on another one.
        "backbone": {"name": _portable(backbone.name), "model_type": backbone.family.model_type},
        "module": about(spec),
        "inputs": about_inputs(backbone, inputs),
    }
    if spec.numbers is not None:
        said["target"] = {"kind": "number", **spec.numbers.model_dump()}
    (folder / ABOUT_FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _portable(name: str) -> str:
    """A bundled name or a hub id as it is; of a path the last part."""
    path = Path(name).expanduser()
    relative = not path.is_absolute() and not name.startswith((".", "~"))
    return name if relative and len(path.parts) < 3 else path.name or path.absolute().name


def _in_peft_format(spec: ModuleSpec) -> bool:
    return spec.kind in {"lora", "classifier"}


def _idle_lora(backbone: Backbone, spec: ModuleSpec) -> ModuleTensors:
    return {
        n: t
        for n, t in initial(backbone, replace(spec, kind="lora"), seed=0).items()
        if ".lora_" in n
    }


def load_exported(
    folder: Path, backbone: Backbone | None = None
) -> tuple[ModuleSpec, ModuleTensors]:
    """What `export` wrote: the spec and the module. Raises BackboneError when it cannot be read.

    With a `backbone`, also when the module was not trained on it or does not fit it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        said = read_json(folder / ABOUT_FILE)
        # Folded deltas may need more than a run may ask for.
        spec = read_about(
            said["module"],
            classes=_classes(said["classes"]),
            numbers=_scale(said.get("target")),
            max_rank=MAX_WIDTH,
        )
        sha256 = said["backbone_sha256"]
        whole = load_file(folder / (PEFT_FILE if _in_peft_format(spec) else OWN_FILE))
        _check_floats(whole)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as err:
        raise BackboneError(
            f"module {folder} cannot be read ({type(err).__name__}: {str(err)[:200]}); give the module folder of "
            f"a run, as fedsplit wrote it"
        ) from err
    tensors = {n.removeprefix(_PEFT_ROOT): t for n, t in whole.items()}
    if spec.kind == "classifier":
        tensors = {n: t for n, t in tensors.items() if ".lora_" not in n}
    if backbone is not None:
        _check_fits(folder, backbone, sha256, spec, tensors)
    return spec, tensors


@dataclass(frozen=True)
class WantedBackbone:
    """The backbone that a module was trained on, as its folder tells of it."""

    sha256: str
    name: str = ""
    """Its name at the run: a hint, empty in a module of before."""
    model_type: str = ""


def wanted_backbone(folder: Path) -> WantedBackbone:
    """Which backbone the module in `folder` was trained on. Raises BackboneError where it does not say."""
    try:
        said = read_json(folder / ABOUT_FILE)
        sha256, hint = said["backbone_sha256"], said.get("backbone", {})
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise ValueError("backbone_sha256 is no digest")
        name, model_type = hint.get("name", ""), hint.get("model_type", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise BackboneError(
            f"module {folder}: {ABOUT_FILE} does not say which backbone it was trained on ({type(err).__name__}: "
            f"{str(err)[:200]}); give the module folder of a run, as fedsplit wrote it"
        ) from err
    return WantedBackbone(sha256, printable(name), printable(model_type, limit=64))


def load_inputs(folder: Path) -> Inputs:
    """How inputs were prepared for the module in `folder`. Raises BackboneError where it does not say."""
    try:
        return read_inputs(read_json(folder / ABOUT_FILE)["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise BackboneError(
            f"module {folder}: {ABOUT_FILE} does not say how inputs are prepared ({type(err).__name__}: "
            f"{str(err)[:200]}); give the module folder of a run, as this version of fedsplit wrote it"
        ) from err


def _check_floats(tensors: Tensors) -> None:
    """Raise ValueError for what no training leaves: a damaged file or one that was made otherwise."""
    for name, value in tensors.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            what = "NaN or infinity" if value.dtype == np.float32 else str(value.dtype)
            raise ValueError(
                f"tensor {printable(name, limit=200)} is {what}, finite float32 is wanted"
            )


def _classes(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not raw or not all(isinstance(c, str) for c in raw):
        raise ValueError("classes: a list of names is wanted")
    return tuple(raw)


def _scale(raw: Any) -> Scale | None:
    """What the output is in; None where a module says nothing of it, whose outputs are classes."""
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("kind") != "number":
        raise ValueError("target: kind number, mean and deviation are wanted")
    return Scale.model_validate({name: value for name, value in raw.items() if name != "kind"})


def _check_fits(
    folder: Path, backbone: Backbone, sha256: Any, spec: ModuleSpec, tensors: ModuleTensors
) -> None:
    if sha256 != backbone.sha256:
        raise BackboneError(
            f"module {folder} was trained on a backbone with digest {str(sha256)[:12]}, {backbone.name!r} has "
            f"{backbone.sha256[:12]} ({backbone.differs(str(sha256))}); use the backbone of that run"
        )
    wanted = shapes(backbone, spec)
    last = final_linear(backbone, spec)[0]
    rows = tensors[last].shape[0] if last in tensors and tensors[last].ndim == 2 else 0
    if rows not in (0, len(spec.classes)):
        raise BackboneError(
            f"module {folder}: its classifier has {rows} classes, {ABOUT_FILE} names {len(spec.classes)} "
            f"({printable(', '.join(spec.classes), limit=200)}); the files are of two modules, copy the folder again"
        )
    got = {n: t.shape for n, t in tensors.items() if t.dtype == np.float32}
    if odd := sorted(n for n in wanted.keys() | tensors.keys() if wanted.get(n) != got.get(n)):
        raise BackboneError(
            f"module {folder}: tensor {odd[0][:200]!r} is {got.get(odd[0], 'missing')}, "
            f"{wanted.get(odd[0], 'nothing')} in float32 is wanted; copy the folder again"
        )


def fold_merged(spec: ModuleSpec, tensors: Tensors) -> tuple[ModuleSpec, ModuleTensors]:
    """The same function as LoRA alone: each layer's merged delta and current product as one pair.

    The pair is the sum's singular value decomposition, cut where float32 ends, so it is exact within that. All
    layers get the largest rank found, zero-padded, and a scale of 1.
    """
    layers = [n.removesuffix(f".{MERGED}.weight") for n in tensors if f".{MERGED}." in n]
    pairs = {layer: _factored(_delta(spec, tensors, layer)) for layer in layers}
    rank = max([1, *(len(a) for _, a in pairs.values())])
    folded: ModuleTensors = {n: t for n, t in tensors.items() if ".lora_" not in n}
    for layer, (b, a) in pairs.items():
        folded[f"{layer}.lora_A.weight"] = np.pad(a, ((0, rank - len(a)), (0, 0)))
        folded[f"{layer}.lora_B.weight"] = np.pad(b, ((0, 0), (0, rank - len(a))))
    return replace(spec, merged=False, rank=rank, max_rank=rank, alpha=rank), folded


def _delta(spec: ModuleSpec, tensors: Tensors, layer: str) -> NDArray[np.float64]:
    a, b, merged = (
        tensors[f"{layer}.{part}.weight"].astype(np.float64)
        for part in ("lora_A", "lora_B", MERGED)
    )
    delta: NDArray[np.float64] = merged + spec.scale * (b @ a)
    return delta


def _factored(delta: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(B, A) with B A equal to `delta` within float32."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    kept = s > s[0] * max(delta.shape) * np.finfo(np.float32).eps
    root = np.sqrt(s[kept])
    return (u[:, kept] * root).astype(np.float32), (root[:, None] * v[kept]).astype(np.float32)
