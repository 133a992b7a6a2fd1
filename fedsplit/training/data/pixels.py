"""Pixel values as a file has them, and the one range of a source that is black to white.

A camera's 12 bits come in files of 16, floats may overshoot 1 by a hair, and Pillow cuts 16-bit
colours to 8. So values are read at their full depth, the largest one of all files tells the range,
and `pixel-max` states it where it must be said.
"""

from __future__ import annotations

import math
import sys
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
# Tags of TIFF, and of photos.
_BITS, _WHITE_IS, _PLANES, _ORIENTATION = 258, 262, 284, 274
_ZERO, _APART = 0, 2
# The rawmode that gives the low bytes of 16-bit samples where Pillow's own gives the high ones. N is the machine's order,
# in which libtiff hands out what it unpacked.
_OTHER = "B" if sys.byteorder == "little" else "L"
_LOW = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", _OTHER))
}


@dataclass(frozen=True)
class Pixels:
    """One image at its full depth."""

    values: NDArray[Any]
    """[H, W] or [H, W, 3]."""
    white: float
    """The value that is white, where the file's format says so (8 bits; PGM); 0 where the source decides."""


def read_pixels(image: Pillow.Image) -> Pixels:
    """Decode an opened image, upright, alpha dropped. Raises what Pillow raises, and ValueError for what has no range."""
    _check_tiff(image)
    deep = _deep_colours(image)
    if deep is not None:
        return Pixels(deep, 0)
    # A PGM says in its header what white is, and Pillow has scaled it to 16 bits by that. Cameras that write 65535 there
    # mean the size of the sample alone.
    told = _WORD if image.format == "PPM" and _largest_of_ppm(image) != _WORD else 0
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
    if image.format == "PPM" and image.mode == "RGB" and _largest_of_ppm(image) == _WORD:
        return _words_of_ppm(image)
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


def _check_tiff(image: Pillow.Image) -> None:
    """Raise ValueError for samples of more than 8 bits in a form of which Pillow gives others, or fewer bits."""
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return
    bits = tags.get(_BITS, (1,))
    if max(bits if isinstance(bits, tuple) else (bits,)) <= 8:
        return
    colours = len(image.getbands()) > 1
    if colours and (tags.get(_PLANES) == _APART or _raw_mode(image) not in _LOW):
        raise ValueError(
            "more than 8 bits a colour, in separate planes or in colours that are not RGB; save it as RGB, interleaved"
        )
    if not colours and tags.get(_WHITE_IS) == _ZERO:
        raise ValueError("more than 8 bits, and 0 is white; save it so that 0 is black")


def _largest_of_ppm(image: Pillow.Image) -> int:
    """The value of white that the header says; 65535 also stands in a header that says no more than the size of a sample."""
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    if isinstance(args, tuple) and len(args) == 2 and isinstance(args[1], int):
        return args[1]
    return _WORD if args == "I;16B" else _BYTE


def _words_of_ppm(image: Any) -> NDArray[Any]:
    """[H, W, 3] uint16 of a PPM whose samples have 16 bits."""
    name, _, offset, _ = image.tile[0]
    if name != "ppm":
        raise ValueError("16-bit colours written as text; save it as PNG")
    shape = (image.height, image.width, 3)
    image.fp.seek(offset)
    raw = image.fp.read(2 * math.prod(shape))
    if len(raw) < 2 * math.prod(shape):
        raise ValueError(
            f"image file is truncated ({2 * math.prod(shape) - len(raw)} bytes missing)"
        )
    return np.frombuffer(raw, ">u2").reshape(shape).astype(np.uint16)


def _raw_mode(image: Pillow.Image) -> str:
    tiles = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _set_raw_mode(image: Any, raw: str) -> None:
    tiles = []
    for tile in image.tile:
        args = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
        # Named tuples since Pillow 11, and TIFF's reader wants the names.
        new = tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)
        tiles.append(new)
    image.tile = tiles


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
