"""What a backbone's own files say about its input: mostly `preprocessor_config.json`, in the spellings that
years of hub uploads left behind.

What is left unsaid: processors.py. It always resizes, for batches need one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import read_json
from fedsplit.model.families import FAMILIES, Family
from fedsplit.model.processors import FILE, filled, takes_shortest_edge, without_file

_BILINEAR = 2
_RESAMPLE_CODES = range(6)
_MAX_SIDE = 8192
_MAX_ASPECT = 16
# From this side on ConvNext squeezes the whole picture; below it crops.
_CONVNEXT_SQUEEZES = 384
# Normalised pixels of real checkpoints span less: 255 / 58 = 4.4 with ImageNet's deviation.
_MAX_SPAN = 20
# Families that count positions from behind the padding id, and so have fewer than they declare.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert"}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes input: resize to `size` or so that its shorter side is `shortest`, crop, scale."""

    output: tuple[int, int]
    """Height and width after the crop."""
    size: tuple[int, int] | None
    shortest: int
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was filled in, overruled or not followed, a sentence each."""

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing, before the crop."""
        if self.size is not None:
            return self.size
        # Very long images are squeezed: the crop drops their ends, and resizing them could fill the memory.
        aspect = min(max(height, width) / min(height, width), _MAX_ASPECT)
        longest = int(self.shortest * aspect)
        return (self.shortest, longest) if height <= width else (longest, self.shortest)


def read_preprocess(directory: Path, image_size: int = 0) -> Preprocess:
    """Read a model directory; `image_size` > 0 scales resize and crop to that side. Raises BackboneError."""
    path = directory / FILE
    try:
        family = _family(directory / "config.json")
        if path.exists():
            raw, notes = filled(_object(path), family)
        else:
            raw, notes = without_file(family, image_size or _model_side(directory / "config.json"))
        return _resolved(raw, image_size, notes)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as err:
        raise BackboneError(
            f"{directory}: its image settings cannot be used ({err}); correct {FILE} "
            "or, without that file, image_size in config.json"
        ) from err


def _family(path: Path) -> Family:
    model_type = _object(path).get("model_type") if path.exists() else None
    return FAMILIES.get(str(model_type), FAMILIES["vit"])


def _resolved(raw: dict[str, Any], image_size: int, notes: list[str]) -> Preprocess:
    size, shortest, output = _sides(raw, notes)
    if image_size:
        if size:
            size = _ratio(size[0], image_size, output[0]), _ratio(size[1], image_size, output[1])
        shortest = _ratio(shortest, image_size, min(output))
        output = (image_size, image_size)
    factor = float(raw.get("rescale_factor", 1 / 255)) if raw.get("do_rescale", True) else 1.0
    mean, std = _channels(raw, "image_mean", 0.5, 0.0), _channels(raw, "image_std", 0.5, 1.0)
    if factor * 255 < 2 and max(mean) > 2:
        notes.append(
            f"{FILE}: image_mean {list(mean)} is one of pixels of 0 .. 255, so rescale_factor is left out"
        )
        factor = 1.0
    if raw.get("do_normalize", True):
        notes += _odd_range(factor, mean, std)
    return Preprocess(
        output=output,
        size=size and _side_pair(size),
        shortest=shortest,
        resample=_resample(raw.get("resample", _BILINEAR)),
        rescale_factor=factor,
        mean=mean,
        std=std,
        notes=tuple(notes),
    )


def _sides(
    raw: dict[str, Any], notes: list[str]
) -> tuple[tuple[int, int] | None, int, tuple[int, int]]:
    """(fixed size or None, shorter side, size after the crop) as the settings say, for the backbone's own size."""
    size, shortest = _target(raw["size"], square=not takes_shortest_edge(raw))
    output = size or (shortest, shortest)
    if raw.get("do_center_crop") and raw.get("crop_size") is not None:
        crop, side = _target(raw["crop_size"], square=True)
        output = crop or (side, side)
    elif "crop_pct" in raw and takes_shortest_edge(raw) and not size:
        if shortest < _CONVNEXT_SQUEEZES:
            shortest = int(shortest / float(raw["crop_pct"]))
        else:
            size, shortest = output, 0
    elif not size:
        notes.append(f"{FILE} asks for no crop: of a picture that is not square the middle is used")
    output = _side_pair(output)
    # A crop larger than the resized image would need padding; enlarging is what such configs mean.
    wide = size and (max(size[0], output[0]), max(size[1], output[1]))
    long = shortest if size else max(shortest, *output)
    if (wide, long) != (size, shortest):
        notes.append(
            f"{FILE}: crop_size is larger than size; pictures are enlarged to it, not padded"
        )
    return wide, long, output


def _odd_range(factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> list[str]:
    black = min(-m / s for m, s in zip(mean, std, strict=True))
    white = max((255 * factor - m) / s for m, s in zip(mean, std, strict=True))
    if black <= 0 <= white and white - black <= _MAX_SPAN:
        return []
    return [
        f"{FILE}: a black pixel becomes {black:.4g} and a white one {white:.4g}, which is far from what backbones "
        f"are trained on; look at rescale_factor, image_mean and image_std"
    ]


def _ratio(side: int, wanted: int, output: int) -> int:
    return round(side * wanted / output)


def _target(raw: Any, *, square: bool) -> tuple[tuple[int, int] | None, int]:
    """A `size` in any spelling -> a fixed (height, width), or None and the shorter side."""
    if isinstance(raw, dict):
        if "height" in raw and "width" in raw:
            return (int(raw["height"]), int(raw["width"])), 0
        return None, int(raw["shortest_edge"])
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        height, width = raw
        return (int(height), int(width)), 0
    return ((int(raw), int(raw)), 0) if square else (None, int(raw))


def _side_pair(sides: tuple[int, int]) -> tuple[int, int]:
    if not all(1 <= side <= _MAX_SIDE for side in sides):
        raise ValueError(f"an image of {sides[0]} x {sides[1]}, wanted 1 .. {_MAX_SIDE} a side")
    return sides


def _resample(raw: Any) -> int:
    if raw not in _RESAMPLE_CODES:
        raise ValueError(f"resample={raw!r}, wanted a code of 0 .. 5")
    return int(raw)


def _channels(raw: dict[str, Any], key: str, default: float, off: float) -> tuple[float, ...]:
    if not raw.get("do_normalize", True):
        return (off,) * 3
    value = raw.get(key, default)
    values = tuple(float(v) for v in (value if isinstance(value, list | tuple) else [value] * 3))
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or (key == "image_std" and 0.0 in values):
        raise ValueError(f"{key}={value!r}, wanted three numbers, none of them a zero deviation")
    return values


def _model_side(path: Path) -> Any:
    config = _object(path)
    vision = config.get("vision_config")
    return config["image_size"] if "image_size" in config or not vision else vision["image_size"]


def read_positions(directory: Path) -> int:
    """The longest text in tokens that the model has positions for; large where config.json does not say."""
    try:
        config = _object(directory / "config.json")
        positions = int(config.get("max_position_embeddings", 2**31))
        if config.get("model_type") in _OFFSET_POSITIONS:
            positions -= int(config.get("pad_token_id", 1)) + 1
    except (OSError, ValueError, TypeError, RecursionError) as err:
        raise BackboneError(
            f"{directory}: its config.json cannot be used ({err}); correct it"
        ) from err
    return positions


def _object(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise TypeError(f"{path.name} is not a JSON object")
    return raw
