"""Writes a module in a form for other programs. A folder appears whole, and only after its answers were compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.core.errors import ConfigError
from fedsplit.core.whole_files import whole_folder, write_whole
from fedsplit.model import module
from fedsplit.model.files import CONFIG, small_files
from fedsplit.model.inputs import about_inputs
from fedsplit.model.preprocess import Preprocess
from fedsplit.model.processors import FILE
from fedsplit.predict.export import onnx
from fedsplit.predict.export.card import Said, card
from fedsplit.predict.export.check import TOLERANCE, batches, largest_difference
from fedsplit.predict.export.merged import MERGEABLE, merged_model, save_merged
from fedsplit.predict.predictor import Predictor
from fedsplit.training.data.examples import Examples
from fedsplit.training.data.transform import Prepared

FORMS = ("onnx", "merged", "hf")
ONNX, INT8, ONNX_ABOUT = "model.onnx", "model.int8.onnx", "onnx.json"
_BATCH = 32


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: tuple[str, ...]
    difference: float | None
    """From the module's own outputs, as a share of the largest; None where the module itself was copied."""
    int8: dict[str, float] = field(default_factory=dict)
    """What int8 costs on labelled data: see `int8_loss`."""


def export_module(
    predictor: Predictor,
    form: str,
    folder: Path,
    *,
    int8_on: Examples | None = None,
    name_sites: bool = False,
) -> Exported:
    """Write the module to `folder`, which must be new or empty. `int8_on`: labelled samples to measure an int8 copy with.

    Raises ConfigError for a folder in use or a module that the form cannot hold, ExportError where answers differ.
    """
    if form not in FORMS:
        raise ConfigError(f"--to {form!r} is not known; {', '.join(FORMS)} are")
    if int8_on is not None and form != "onnx":
        raise ConfigError(f"--int8 is for --to onnx, not for --to {form}; leave it out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; give --out a new folder, or an empty one")
    try:
        with whole_folder(folder) as part:
            difference: float | None = None
            int8: dict[str, float] = {}
            if form == "onnx":
                difference, int8 = _onnx(part, predictor, int8_on, name_sites=name_sites)
            elif form == "merged" or predictor.spec.kind == "full":
                difference = _merged(part, predictor, name_sites=name_sites)
            else:
                _layout(part, predictor, name_sites=name_sites)
            files = tuple(sorted(f.name for f in part.iterdir()))
    except OSError as err:
        raise ConfigError(
            f"{folder} cannot be written ({err}); nothing was left there. Give --out a place with room and rights"
        ) from err
    return Exported(folder, files, difference, int8)


def _onnx(
    part: Path, predictor: Predictor, int8_on: Examples | None, *, name_sites: bool
) -> tuple[float, dict[str, float]]:
    backbone, spec = predictor.backbone, predictor.spec
    _, tensors = module.load_exported(predictor.found.folder, backbone)
    model = merged_model(backbone, spec, tensors) if spec.kind in MERGEABLE else predictor.model
    example = list(batches(predictor))[-2 if predictor.kind == "text" else -1]
    names = onnx.save_onnx(part / ONNX, model, predictor, example)
    plain = onnx.runner(part / ONNX, predictor)
    difference = largest_difference(predictor, plain, what="the ONNX file")
    checks = [_equal(difference, "onnxruntime")]
    loss: dict[str, float] = {}
    if int8_on is not None:
        onnx.save_int8(part / ONNX, part / INT8)
        loss = int8_loss(predictor, onnx.runner(part / INT8, predictor), int8_on)
        checks.append(told_loss(loss))
    _copy_inputs(part, predictor)
    about = {
        "classes": list(spec.classes),
        "target": "class" if spec.numbers is None else "number",
        "inputs": about_inputs(backbone, predictor.inputs),
        "feeds": names,
        "output": onnx.output_name(predictor),
        "opset": onnx.OPSET,
        "difference": difference,
        "tolerance": TOLERANCE,
        "int8": loss or None,
        "module": predictor.found.digest,
        "backbone_sha256": backbone.sha256,
    }
    _write_json(part / ONNX_ABOUT, about)
    use = f"```python\n{_ONNX_IMAGE if predictor.kind == 'image' else _ONNX_TEXT}```"
    if spec.numbers is not None:
        use += "\n\nThe output is the number in its own unit."
    said = Said(library="onnx", use=use, checks=tuple(checks), name_sites=name_sites)
    write_whole(part / "README.md", card(predictor, said))
    return difference, loss


def _merged(part: Path, predictor: Predictor, *, name_sites: bool) -> float:
    import transformers

    backbone, spec = predictor.backbone, predictor.spec
    _, tensors = module.load_exported(predictor.found.folder, backbone)
    save_merged(part, backbone, spec, merged_model(backbone, spec, tensors))
    _copy_inputs(part, predictor)
    found = getattr(transformers, backbone.family.model_class).from_pretrained(
        part, local_files_only=True, dtype=torch.float32
    )
    keywords = {"interpolate_pos_encoding": True} if backbone.family.embed_kwargs else {}

    def answer(batch: list[Prepared]) -> NDArray[np.float32]:
        inputs, _ = predictor.transform.assemble(batch)
        if backbone.family.model_type not in _TYPE_IDS:
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            outputs: NDArray[np.float32] = found(**inputs, **keywords).logits.numpy()
        return outputs

    difference = largest_difference(predictor, answer, what="the merged model")
    checks = (_equal(difference, f"transformers' {backbone.family.model_class}"),)
    said = Said(
        library="transformers",
        use=_transformers_use(predictor),
        checks=checks,
        name_sites=name_sites,
    )
    write_whole(part / "README.md", card(predictor, said))
    return difference


_TYPE_IDS = ("bert", "roberta")
"""Families whose model takes type ids."""


def _layout(part: Path, predictor: Predictor, *, name_sites: bool) -> None:
    """The module's own files and a card: PEFT loads LoRA and a classifier, fedsplit every kind."""
    for file in sorted(predictor.found.folder.iterdir()):
        if file.is_file() and file.name != "version.json":
            shutil.copyfile(file, part / file.name)
    peft = predictor.spec.kind in ("lora", "classifier")
    use = _PEFT.format(model=predictor.backbone.family.model_class) if peft else ""
    use += "```\nfedsplit predict --module THIS_FOLDER --backbone BACKBONE_FOLDER INPUT...\n```"
    if not peft:
        use += f"\n\nPEFT has no form of a {predictor.spec.kind} module: only fedsplit loads it."
    checks = ("The files are the module's own, byte for byte.",)
    said = Said(library="peft" if peft else "", use=use, checks=checks, name_sites=name_sites)
    write_whole(part / "README.md", card(predictor, said))


def int8_loss(
    predictor: Predictor,
    answer: Callable[[list[Prepared]], NDArray[np.float32]],
    examples: Examples,
) -> dict[str, float]:
    """On labelled samples: `samples`; accuracies as `before` and `after` int8 and the share `changed`; of numbers MAEs."""
    if not len(examples):
        raise ConfigError("--data has no samples; give labelled ones to measure int8 with")
    want = predictor.over(examples, batch_size=_BATCH)
    order = range(0, len(examples), _BATCH)
    transform = predictor.transform
    got = np.concatenate(
        [
            answer(list(transform.prepare(examples, range(at, min(at + _BATCH, len(examples))))))
            for at in order
        ]
    )
    found = {"samples": float(len(examples))}
    if examples.numbers is not None:
        both = (np.abs(predictor.probabilities(o)[:, 0] - examples.numbers) for o in (want, got))
        before, after = (float(errors.mean()) for errors in both)
        return found | {"before": before, "after": after}
    right = [float((o.argmax(axis=1) == examples.labels).mean()) for o in (want, got)]
    changed = float((want.argmax(axis=1) != got.argmax(axis=1)).mean())
    return found | {"before": right[0], "after": right[1], "changed": changed}


def told_loss(loss: dict[str, float]) -> str:
    """In words."""
    if "changed" not in loss:
        return (
            f"int8: the mean absolute error goes from {loss['before']:.4g} to {loss['after']:.4g}, on "
            f"{loss['samples']:.0f} samples."
        )
    return (
        f"int8: accuracy goes from {loss['before']:.4f} to {loss['after']:.4f}, {loss['changed']:.2%} of the answers "
        f"change, on {loss['samples']:.0f} samples."
    )


def _equal(difference: float, what: str) -> str:
    return (
        f"{what} gives the module's outputs: the largest difference is {difference:.1g} of the largest output, on invented "
        f"inputs of several batch sizes; {TOLERANCE:g} is allowed."
    )


def _copy_inputs(part: Path, predictor: Predictor) -> None:
    """What prepares inputs: a tokenizer's files, or image settings as the run resolved them."""
    if predictor.kind == "image":
        settings: Any = predictor.transform.settings  # type: ignore[union-attr]
        _write_json(part / FILE, image_settings(settings))
        return
    for file in small_files(predictor.backbone.path):
        if file.name not in (CONFIG, FILE):
            shutil.copyfile(file, part / file.name)


def image_settings(found: Preprocess) -> dict[str, Any]:
    """`preprocessor_config.json` that says all and leaves nothing to a class."""
    size = (
        {"height": found.size[0], "width": found.size[1]}
        if found.size
        else {"shortest_edge": found.shortest}
    )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": found.resample,
        "do_center_crop": True,
        "crop_size": {"height": found.output[0], "width": found.output[1]},
        "do_rescale": True,
        "rescale_factor": found.rescale_factor,
        "do_normalize": True,
        "image_mean": list(found.mean),
        "image_std": list(found.std),
    }


def _write_json(path: Path, said: dict[str, Any]) -> None:
    write_whole(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _transformers_use(predictor: Predictor) -> str:
    kind, scale = predictor.kind, predictor.spec.numbers
    auto = (
        "AutoModelForImageClassification"
        if kind == "image"
        else "AutoModelForSequenceClassification"
    )
    lines = [
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("THIS_FOLDER", dtype="float32")',
        "```",
        "",
    ]
    if predictor.backbone.family.embed_kwargs:
        lines.append(
            "Call it with `interpolate_pos_encoding=True` where images have another size than config.json's. "
        )
    if kind == "image":
        lines.append(
            "preprocessor_config.json has all that prepares an image. It is RGB, resized with Pillow."
        )
    else:
        tokens = about_inputs(predictor.backbone, predictor.inputs).get("tokens")
        lines.append(f"Texts are cut at {tokens} tokens and padded on the right.")
    if scale is not None:
        lines.append(f"\nThe number is `logits * {scale.deviation!r} + {scale.mean!r}`.")
    return "\n".join(lines)


_PEFT = """```python
from peft import PeftModel
from transformers import {model}

whole = {model}.from_pretrained("BACKBONE_FOLDER", num_labels=CLASSES, dtype="float32")
model = PeftModel.from_pretrained(whole, "THIS_FOLDER").eval()
```

"""
_ONNX_IMAGE = """import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

said = json.load(open("onnx.json", encoding="utf-8"))
how = said["inputs"]
image = Image.open(sys.argv[1]).convert("RGB")  # 8 bits a channel
width, height = image.size
if isinstance(how["resize"], list):
    height, width = how["resize"]
elif height <= width:
    height, width = how["resize"], int(how["resize"] * min(width / height, 16))
else:
    height, width = int(how["resize"] * min(height / width, 16)), how["resize"]
pixels = np.asarray(image.resize((width, height), Image.Resampling(how["resample"])))
high, wide = how["output"]
top, left = (height - high) // 2, (width - wide) // 2
pixels = pixels[top : top + high, left : left + wide].astype("float32") * np.float32(how["rescale_factor"])
pixels = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None]})[0]
print(said["classes"][outputs[0].argmax()] if said["target"] == "class" else outputs[0, 0])
"""
_ONNX_TEXT = """import json
import sys

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

said = json.load(open("onnx.json", encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = tokenizer(sys.argv[1:], truncation=True, max_length=said["inputs"]["tokens"], padding=True)
feeds = {name: np.array(tokens[name], dtype="int64") for name in said["feeds"]}
session = onnxruntime.InferenceSession("model.onnx")
for outputs in session.run(None, feeds)[0]:
    print(said["classes"][outputs.argmax()] if said["target"] == "class" else outputs[0])
"""
