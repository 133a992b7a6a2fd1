"""Pixel values as a file has them, and the one range of a source that is black to white.

A camera's 12 bits come in files of 16, floats may overshoot 1 by a hair, and Pillow cuts 16-bit colours to 8. So values are
read at their full depth, the largest one of all files tells the range, and `pixel-max` states it where it must be said.
Called by folder.py, arrays.py and hub.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from fedsplit.training.data.examples import Image

DEPTHS = (255, 1023, 4095, 16383, 65535)
"""White of 8, 10, 12, 14 and 16 bits."""
_BYTE, _WORD = 255, 65535
_FEW = 64
"""8-bit images that stay below are dark, or have fewer bits than their files."""
_UNIT_OVERSHOOT = 1.01
"""Floats up to here are 0 .. 1: interpolation and float32 go beyond 1 by a little."""
_ORIENTATION = 0x0112
# The rawmode that gives the low bytes of 16-bit samples where Pillow's own gives the high ones.
_LOW = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B"}


@dataclass(frozen=True)
class Pixels:
    """One image at its full depth."""

    values: NDArray[Any]
    """[H, W] or [H, W, 3]."""
    white: float
    """The value that is white, where the file's format says so (8 bits; PGM); 0 where the source decides."""


def read_pixels(image: Pillow.Image) -> Pixels:
    """Decode an opened image, upright, alpha dropped. Raises what Pillow raises, and ValueError for what has no range."""
    deep = _deep_colours(image)
    if deep is not None:
        return Pixels(deep, 0)
    # A PGM says in its header what white is, and Pillow has scaled it to 16 bits by that.
    told = _WORD if image.format == "PPM" else 0
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return Pixels(np.asarray(upright).astype(np.uint16), told)
    if upright.mode in {"I", "F"}:
        values = np.asarray(upright)
        if not np.isfinite(values).all() or values.min() < 0:
            raise ValueError(
                "its pixels are negative, infinite or NaN; save it with 8 or 16 bits a channel"
            )
        return Pixels(values, told)
    return Pixels(np.asarray(upright.convert("RGB"), dtype=np.uint8), _BYTE)


def to_bytes(pixels: Pixels, white: float) -> Image:
    """uint8 [H, W, 3]; `white` is the source's value of white, 0 where it has none of its own."""
    own = pixels.white if pixels.white != _BYTE or not white or white > _BYTE else white
    return scaled(pixels.values, own or white or DEPTHS[-1])


def scaled(values: NDArray[Any], white: float) -> Image:
    """Values 0 .. `white` as uint8 [H, W, 3]: grey is repeated, a fourth channel dropped, what is beyond is white."""
    if values.dtype != np.uint8 or white != _BYTE:
        values = np.rint(np.clip(values.astype(np.float64) * (_BYTE / white), 0, _BYTE))
    if values.ndim == 2:
        values = values[:, :, None]
    if values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    return np.ascontiguousarray(values[:, :, :3], dtype=np.uint8)


def white_of(largest: float, *, floats: bool) -> float | None:
    """What white is where the largest value of a source is `largest`; None where it cannot be told."""
    if floats:
        if largest <= _UNIT_OVERSHOOT:
            return 1.0
        # Between the two nothing tells 0 .. 1 with outliers from a dark 0 .. 255.
        return 255.0 if 16 <= largest <= 255.5 else None
    return next((float(depth) for depth in DEPTHS if largest <= depth), None)


def range_notes(
    *, white: float, largest: float, stated: bool, floats: bool = False, deep: bool = False
) -> list[str]:
    """What there is to say of a source's range. `deep`: in files that can hold more than 8 bits."""
    if stated:
        more = (
            f"; values up to {largest:g} are beyond it and become white" if largest > white else ""
        )
        return [f"pixel-max={white:g} is white, as set; the largest value is {largest:g}{more}"]
    if white == _BYTE and not (floats or deep):
        if largest >= _FEW:
            return []
        return [
            f"pixels use 0 to {largest:g} of 255, so the images are dark; if {largest:g} is white, set pixel-max={largest:g}"
        ]
    kind = "floats" if floats else f"{int(white).bit_length()}-bit values"
    return [
        f"pixels are {kind}: 0 to {white:g} is read as black to white (largest found: {largest:.6g}); set pixel-max if "
        "another value is white"
    ]


def _deep_colours(image: Pillow.Image) -> NDArray[Any] | None:
    """[H, W, 3] or [H, W] uint16 of an image with 16 bits a colour, which Pillow reads as 8; None for all others."""
    raw = _raw_mode(image)
    if raw == "LA;16B":
        return _upright(image, _grey_of_grey_alpha(image))
    if raw not in _LOW or image.mode not in {"RGB", "RGBA"}:
        return None
    # A second reading of the same file: the first one's low bytes are gone.
    with _again(image) as again:
        high = np.asarray(image, dtype=np.uint16)[:, :, :3]
        _set_raw_mode(again, _LOW[raw])
        low = np.asarray(again, dtype=np.uint16)[:, :, :3]
    return _upright(image, (high << 8) | low)


def _grey_of_grey_alpha(image: Pillow.Image) -> NDArray[Any]:
    """Of two 16-bit samples a pixel, read as four bytes, the first is grey."""
    with _again(image) as again:
        again._mode = "RGBA"
        _set_raw_mode(again, "RGBA")
        four = np.asarray(again, dtype=np.uint16)
    grey: NDArray[Any] = (four[:, :, 0] << 8) | four[:, :, 1]
    return grey


def _raw_mode(image: Pillow.Image) -> str:
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _set_raw_mode(image: Any, raw: str) -> None:
    image.tile = [
        (*tile[:3], (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
        for tile in image.tile
    ]


def _again(image: Pillow.Image) -> Any:
    source: Any = getattr(image, "filename", "") or image.fp  # type: ignore[attr-defined]
    if hasattr(source, "seek"):
        source.seek(0)
    return Pillow.open(source, formats=(str(image.format),))


def _upright(image: Pillow.Image, values: NDArray[Any]) -> NDArray[Any]:
    """As ImageOps.exif_transpose does, for arrays."""
    turn = image.getexif().get(_ORIENTATION, 1)
    if turn in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        values = values[:, ::-1]
    if turn in (3, 4, 7, 8):
        values = values[::-1]
    return values
