"""Image files on disk: decoded when asked for, and looked at once, several at a time, before a run relies on them.

Which files they are is folder.py's; what their pixels mean is pixels.py's.
"""

from __future__ import annotations

import functools
import logging
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image as Pillow

from fedsplit.core.cpus import usable_cpus
from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.training.data.examples import Image, Request, digest_of
from fedsplit.training.data.pixels import range_notes, read_pixels, to_bytes, white_of

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
"""Decoded, that is 192 MB; a small file can claim much more (decompression bomb)."""
_PROGRESS_S = 10.0

# Pillow guesses the format from the content; only these decoders may run, never EPS with its Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    UserWarning,
    struct.error,
    zlib.error,
    Pillow.DecompressionBombError,
    Pillow.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Seen:
    """What decoding a file showed."""

    fault: DataError | None = None
    deep: bool = False
    """Does the source's range decide what is white in it?"""
    floats: bool = False
    largest: float = 0.0
    pages: int = 1


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files on disk, none of them held in memory."""

    request: Request
    paths: list[str]
    white: float = 0.0
    """Value of white in files whose format does not say it; 0: there are none."""

    def get(self, i: int) -> Image:
        """Decode file `i`."""
        path = self.paths[i]
        try:
            with opened(path) as image:
                check_size(self.request, path, image)
                return to_bytes(read_pixels(image), self.white)
        except PILLOW_ERRORS as err:
            raise self._broken(path, err) from err

    def origin(self, i: int) -> str:
        """The file's path."""
        return self.paths[i]

    def digest(self, i: int) -> int:
        """Of the file's bytes."""
        path = Path(self.paths[i])
        try:
            return digest_of(path.read_bytes())
        except OSError as err:
            raise self._broken(str(path), err) from err

    @functools.cached_property
    def nbytes(self) -> int:
        """Of the paths."""
        return sum(map(sys.getsizeof, self.paths))

    def look(self, i: int) -> Seen:
        """Decode file `i` and say what it is like."""
        path = self.paths[i]
        try:
            size = Path(path).stat().st_size
            if size > MAX_FILE_BYTES:
                text = f"{size} bytes, more than the {MAX_FILE_BYTES} allowed; scale it down"
                return Seen(self.request.fault(path, text))
            with opened(path) as image:
                check_size(self.request, path, image)
                return seen_in(image)
        except DataError as err:
            return Seen(err)
        except PILLOW_ERRORS as err:
            return Seen(self._broken(path, err))

    def _broken(self, path: str, err: BaseException) -> DataError:
        if isinstance(err, Pillow.DecompressionBombError | Pillow.DecompressionBombWarning):
            return self.request.fault(
                path, f"more pixels than the {MAX_PIXELS} allowed ({err}); scale it down"
            )
        return self.request.fault(
            path, f"not a readable image ({printable(err, limit=200)}); replace or remove the file"
        )


def opened(source: str | BinaryIO) -> Pillow.Image:
    """An image of which nothing but the header is read. Raises PILLOW_ERRORS."""
    return Pillow.open(source, formats=_FORMATS)


def check_size(request: Request, where: str, image: Pillow.Image) -> None:
    """Raise DataError for more pixels than are decoded."""
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise request.fault(
            where, f"{pixels} pixels, more than the {MAX_PIXELS} allowed; scale it down"
        )


def seen_in(image: Pillow.Image) -> Seen:
    """Decode an opened image and say what it is like. Raises PILLOW_ERRORS."""
    pages = int(getattr(image, "n_frames", 1))
    pixels = read_pixels(image)
    values = pixels.values
    return Seen(
        deep=pixels.white == 0,
        floats=values.dtype.kind == "f",
        largest=float(values.max()),
        pages=pages,
    )


def range_of(seen: Sequence[Seen], request: Request, where: object) -> tuple[float, list[str]]:
    """White of the images whose format does not say it, 0 where there are none; what there is to say of it."""
    good = [one for one in seen if one.fault is None]
    deep = [one for one in good if one.deep]
    largest = max((one.largest for one in deep or good), default=0.0)
    floats = any(one.floats for one in deep)
    if request.pixel_max:
        return request.pixel_max, range_notes(
            white=request.pixel_max, largest=largest, stated=True, floats=floats
        )
    if not deep:
        return 0.0, range_notes(white=255.0, largest=largest, stated=False)
    white = white_of(largest, floats=floats)
    if white is None:
        raise request.fault(
            where,
            f"pixels go up to {largest:g}, and nothing says which value is white; set pixel-max",
        )
    if white == 1 and len(deep) < len(good):
        raise request.fault(
            where,
            f"pixels are floats of 0 to 1 in {len(deep)} of {len(good)} images and whole numbers in the others; a source "
            f"has one range: save all images in one of the two forms",
        )
    notes = range_notes(white=white, largest=largest, stated=False, floats=floats, deep=True)
    dark = sum(one.largest < white / 8 for one in deep)
    if dark:
        notes.append(
            f"{dark} of {len(deep)} such files stay below an eighth of that; if they have fewer bits, put them into a source "
            f"of their own"
        )
    return white, notes


def look_at(items: ImageFiles, keys: Sequence[int]) -> list[Seen]:
    """Decode files side by side; long work is told in the log."""
    began = said = time.monotonic()
    looks: list[Seen] = []
    with ThreadPoolExecutor(usable_cpus(), thread_name_prefix="fedsplit-decode") as pool:
        for done, one in enumerate(pool.map(items.look, keys, chunksize=16), 1):
            looks.append(one)
            now = time.monotonic()
            if now - said > _PROGRESS_S:
                said, left = now, (now - began) / done * (len(keys) - done)
                log.warning("%d of %d images are checked, about %.0f s left", done, len(keys), left)
    return looks
