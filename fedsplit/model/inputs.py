"""How a run prepares inputs, as its exported module keeps it: `inputs` in fedsplit.json.

The run's own settings are what prepares them again (predict/predictor.py); what the backbone's files made of them is
written out beside, for programs without fedsplit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone
from fedsplit.model.preprocess import read_positions, read_preprocess
from fedsplit.model.tokenizer import read_tokenizer

DTYPE = "float32"
"""What backbones are computed in, whatever they are stored in."""
_LIMITS = {"image_size": 2048, "max_length": 8192, "pixel_max": 2**32}
_BYTE = 255


@dataclass(frozen=True)
class Inputs:
    """The settings of a run that decide what an input looks like."""

    image_size: int = 0
    """Side of images; 0: the backbone's own."""
    max_length: int = 128
    """Tokens of a text."""
    pixel_max: float = 0
    """The value of a white pixel in files that do not say it; 0: none that holds for all sites."""
    unit_floats: bool = False
    """Were the sites' images floats of 0 to 1?"""

    @classmethod
    def of(cls, config: RunConfig, ranges: Collection[float] = ()) -> Inputs:
        """Those of a run; `ranges` are the values of white that its sites found, 0 where there is none."""
        found = set(ranges)
        # Of 8 bits and less a file says itself what white is. Where sites differ, no one value is right.
        agreed = max(found) if len(found) == 1 and max(found) > _BYTE else 0.0
        task = config.task
        return cls(task.image_size, task.max_length, task.pixel_max or agreed, found == {1.0})


def about_inputs(backbone: Backbone, inputs: Inputs) -> dict[str, Any]:
    """Settings and what comes of them, ready for JSON. A text backbone without tokenizer has only the settings."""
    said: dict[str, Any] = {"kind": backbone.family.kind, "dtype": DTYPE}
    if backbone.family.kind == "image":
        return said | _about_images(backbone, inputs)
    said["max_length"] = inputs.max_length
    try:
        tokenizer = read_tokenizer(backbone.path)
    except BackboneError:
        return said
    longest = min(inputs.max_length, int(tokenizer.model_max_length), read_positions(backbone.path))
    names = {"tokenizer": type(tokenizer).__name__, "vocabulary": len(tokenizer)}
    return said | names | {"tokens": longest, "padding": "right", "pad_id": tokenizer.pad_token_id}


def _about_images(backbone: Backbone, inputs: Inputs) -> dict[str, Any]:
    found = read_preprocess(backbone.path, inputs.image_size)
    return {
        "image_size": inputs.image_size,
        "pixel_max": inputs.pixel_max,
        "unit_floats": inputs.unit_floats,
        # Height and width, or the shorter side, before the crop of the middle to `output`.
        "resize": list(found.size) if found.size else found.shortest,
        "output": list(found.output),
        "resample": found.resample,
        "rescale_factor": found.rescale_factor,
        "mean": list(found.mean),
        "std": list(found.std),
    }


def read_inputs(raw: Any) -> Inputs:
    """The settings of what `about_inputs` made. Raises ValueError."""
    if not isinstance(raw, Mapping) or raw.get("dtype") != DTYPE:
        raise ValueError(f"inputs: kind, dtype {DTYPE} and what prepares them are wanted")
    kept = {name: raw[name] for name in _LIMITS if name in raw}
    # `type`, for True is an int to isinstance; NaN is within nothing.
    bad = [
        name
        for name, value in kept.items()
        if type(value) not in ((int, float) if name == "pixel_max" else (int,))
        or not 0 <= value <= _LIMITS[name]
    ]
    if bad:
        raise ValueError(f"inputs: {', '.join(bad)} is out of range")
    unit_floats = raw.get("unit_floats", False)
    if not isinstance(unit_floats, bool):
        raise ValueError("inputs: unit_floats is true or false")
    return Inputs(**kept, unit_floats=unit_floats)
