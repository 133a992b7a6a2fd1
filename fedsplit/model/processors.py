"""What a `preprocessor_config.json` leaves unsaid, and what it says that fedsplit does not do.

Unsaid values are the image processor class's own, as in transformers; without the file they are
those that the family's checkpoints are published with.
"""

from __future__ import annotations

from typing import Any

from fedsplit.model.families import Family

FILE = "preprocessor_config.json"
_BILINEAR, _BICUBIC = 2, 3
_HALF = [0.5, 0.5, 0.5]
_CLIP: dict[str, Any] = {
    "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": _BICUBIC,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
# transformers' own; a test compares them. Kept here so that a device need not load its classes, and so that two
# versions of transformers read one file alike.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {
        "size": {"height": 224, "width": 224}, "resample": _BILINEAR, "image_mean": _HALF, "image_std": _HALF,
    },
    "DeiTImageProcessor": {
        "size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True, "resample": _BICUBIC,
        "image_mean": _HALF, "image_std": _HALF,
    },
    "BitImageProcessor": _CLIP,
    "CLIPImageProcessor": _CLIP,
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": _BICUBIC, "image_mean": _HALF,
        "image_std": _HALF,
    },
}  # fmt: skip
# Classes for which a plain-number `size` is the shorter side, not a square.
_SHORTEST_EDGE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "Levit")
_VALUES = ("size", "crop_size", "resample", "image_mean", "image_std")
_FOLLOWED = frozenset(_VALUES) | {
    "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize", "image_processor_type",
    "feature_extractor_type",
}  # fmt: skip
# Pictures are RGB, one array each, before any of this: these have nothing left to change.
_IDLE = frozenset({
    "do_convert_rgb", "data_format", "input_data_format", "return_tensors", "device", "processor_class",
    "_processor_class", "_valid_processor_keys", "disable_grouping", "auto_map", "default_to_square",
    "transformers_version", "_name_or_path", "name_or_path", "num_channels", "use_fast",
})  # fmt: skip


def takes_shortest_edge(raw: dict[str, Any]) -> bool:
    """Is a plain-number `size` of these settings the shorter side?"""
    return str(raw.get("image_processor_type", "")).startswith(_SHORTEST_EDGE)


def without_file(family: Family, side: Any) -> tuple[dict[str, Any], list[str]]:
    """Settings of a backbone without the file, at the model's own side, and what to tell of them."""
    raw = {"size": side, **dict(family.pixels)}
    note = (
        f"the backbone has no {FILE}: pictures are resized to {side} px and normalised as published "
        f"{family.model_type} checkpoints want (mean {raw['image_mean']}, deviation {raw['image_std']}); put the "
        f"checkpoint's own file beside config.json if it was trained otherwise"
    )
    return raw, [note]


def filled(raw: dict[str, Any], family: Family) -> tuple[dict[str, Any], list[str]]:
    """The file's settings over its class's own, and what to tell of them. Raises ValueError."""
    raw = {k: v for k, v in raw.items() if v is not None}
    name = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "")
    name = (
        name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    )
    raw["image_processor_type"] = name = name or family.processor
    own = DEFAULTS.get(name)
    unsaid = _unsaid((own or {}) | raw, raw)
    if own is None and unsaid:
        raise ValueError(
            f"{FILE} leaves {', '.join(unsaid)} to its class {name[:100]!r}, and fedsplit does not know that class's "
            f"own values; write them into the file"
        )
    notes = []
    if own and "crop_size" in unsaid and isinstance(raw.get("size"), int):
        # A class's own crop of a smaller picture would be mostly border.
        own = own | {"crop_size": min(own["crop_size"], raw["size"])}
    if own is not None and unsaid:
        values = ", ".join(f"{k} {own[k]}" for k in unsaid)
        notes.append(f"{FILE} leaves this to {name}, whose own values are used: {values}")
    if odd := _not_followed(raw, own):
        notes.append(f"{FILE}: this may change pixels and is not followed: {', '.join(odd)[:200]}")
    return (own or {}) | raw, notes


def _unsaid(whole: dict[str, Any], raw: dict[str, Any]) -> list[str]:
    needed = set(_VALUES)
    if not whole.get("do_center_crop"):
        needed.discard("crop_size")
    if not whole.get("do_normalize", True):
        needed -= {"image_mean", "image_std"}
    return [key for key in _VALUES if key in needed - raw.keys()]


def _not_followed(raw: dict[str, Any], own: dict[str, Any] | None) -> list[str]:
    known = _FOLLOWED | _IDLE | (own or {}).keys()
    odd = sorted(f"{k}={v}"[:60] for k, v in raw.items() if k not in known and v)
    if raw.get("do_resize") is False:
        odd.append("do_resize=false")
    size = raw.get("size")
    if isinstance(size, dict):
        sides = {"height", "width"} if {"height", "width"} <= size.keys() else {"shortest_edge"}
        odd += [f"size.{k}" for k, v in sorted(size.items()) if k not in sides and v]
    if own is None:
        odd.append(
            f"what the class {raw['image_processor_type'][:100]} does beside resize and crop"
        )
    return odd
