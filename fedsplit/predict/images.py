"""One image, from a file or from bytes, as a run of training read its own: upright, at its full depth, in one range.

The rule for the value of white is training/data/image_files.py's; there a whole source is looked at, here one image alone,
so what the module keeps of the run decides.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.model.inputs import Inputs
from fedsplit.training.data.examples import Image
from fedsplit.training.data.image_files import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    PILLOW_ERRORS,
    opened,
)
from fedsplit.training.data.pixels import Pixels, read_pixels, to_bytes

_BYTE = 255
_UNIT_OVERSHOOT = 1.01
_NO_IMAGE = "it is no PNG, JPEG, BMP, GIF, WEBP, TIFF or PPM"
_STATE = "give it: --pixel-max, or load_predictor(..., pixel_max=...)"


@dataclass(frozen=True, eq=False)
class ReadImage:
    """A decoded image and what there is to say of its file."""

    pixels: Image
    """uint8 [H, W, 3]."""
    pages: int = 1
    """Pages or frames of the file; the first is used."""


def read_image(source: str | Path | bytes, inputs: Inputs, *, where: str = "") -> ReadImage:
    """Decode an image; `where` is what a person calls it. Raises DataError."""
    where = where or ("the image" if isinstance(source, bytes) else str(source))
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        if size > MAX_FILE_BYTES:
            raise fault(
                where, f"{size} bytes, more than the {MAX_FILE_BYTES} allowed; scale it down"
            )
        with opened(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise fault(
                    where,
                    f"{image.width * image.height} pixels, more than the {MAX_PIXELS} allowed; scale it down",
                )
            pages = int(getattr(image, "n_frames", 1))
            pixels = read_pixels(image)
            return ReadImage(to_bytes(pixels, _white(pixels, inputs, where)), pages)
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as err:
        raise fault(
            where, f"more pixels than the {MAX_PIXELS} allowed ({err}); scale it down"
        ) from err
    except FileNotFoundError as err:
        raise fault(where, "there is no such file; check the path") from err
    except PILLOW_ERRORS as err:
        # Of bytes Pillow says where in memory they lie.
        why = _NO_IMAGE if isinstance(err, UnidentifiedImageError) else printable(err, limit=200)
        raise fault(where, f"not a readable image ({why}); replace or remove the file") from err


def fault(where: object, problem: str) -> DataError:
    """The error for an input; `problem` ends with what to do."""
    return DataError(f"{printable(where, limit=1000)}: {problem}")


def checked_pixels(array: NDArray[Any]) -> Image:
    """The array itself. Raises DataError unless it is uint8 [H, W, 3]."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise DataError(
            f"an array of {array.dtype} {array.shape} given, uint8 [H, W, 3] is wanted; give the file's "
            f"path, so that it is read as the run read its own"
        )
    return array


def _white(pixels: Pixels, inputs: Inputs, where: str) -> float:
    """The value of white for `to_bytes`. Raises DataError where nothing says it."""
    white, largest = inputs.pixel_max, float(pixels.values.max())
    if pixels.white == _BYTE:
        # A range of floats says nothing of a file of 8 bits, unless that holds 0 and 1 alone.
        return 0.0 if white <= 1 < largest else white
    if pixels.white:
        return 0.0
    floats = pixels.values.dtype.kind == "f"
    if not white and floats and inputs.unit_floats and largest <= _UNIT_OVERSHOOT:
        return 1.0
    if not white:
        raise fault(
            where,
            f"pixels go up to {largest:g}, and neither the file nor the module says which value is white; {_STATE}",
        )
    if (not floats and white <= 1 < largest) or (floats and 0 < largest <= _UNIT_OVERSHOOT < white):
        kind = "floats" if floats else "whole numbers"
        raise fault(
            where,
            f"pixels are {kind} up to {largest:g}, the run read 0 to {white:g} as black to white; if another value is white "
            f"here, {_STATE}",
        )
    return white
