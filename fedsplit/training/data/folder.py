"""Images from a folder with one folder a class, decoded one at a time when asked for.

At load every file is opened and verified (headers, PNG checksums), not decoded; what only decoding shows
raises later, with the same naming of site and file. `to_rgb` also serves hub.py. Called by source.py.
"""

from __future__ import annotations

import logging
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps

from fedsplit.training.data.examples import Examples, Image, Request, build, digest_of

log = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
"""Decoded, that is 192 MB; a small file can claim much more (decompression bomb)."""

# Pillow guesses the format from the content; only these decoders may run, never EPS with its Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")
_PILLOW_ERRORS = (
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


@dataclass(frozen=True, eq=False)
class FolderItems:
    """Image files on disk, none of them held in memory."""

    request: Request
    paths: list[str]

    def get(self, i: int) -> Image:
        """Decode file `i`."""
        path = self.paths[i]
        try:
            with Pillow.open(path, formats=_FORMATS) as image:
                self._check_size(path, image)
                return to_rgb(image)
        except _PILLOW_ERRORS as err:
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

    def verify(self, i: int) -> None:
        """Check file `i` without decoding it. Raises DataError."""
        path = self.paths[i]
        try:
            size = Path(path).stat().st_size
            if size > MAX_FILE_BYTES:
                raise self.request.fault(
                    path, f"{size} bytes, more than the {MAX_FILE_BYTES} allowed; scale it down"
                )
            with Pillow.open(path, formats=_FORMATS) as image:
                self._check_size(path, image)
                image.verify()
        except _PILLOW_ERRORS as err:
            raise self._broken(path, err) from err

    def _check_size(self, path: str, image: Pillow.Image) -> None:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise self.request.fault(
                path, f"{pixels} pixels, more than the {MAX_PIXELS} allowed; scale it down"
            )

    def _broken(self, path: str, err: BaseException) -> Exception:
        if isinstance(err, Pillow.DecompressionBombError | Pillow.DecompressionBombWarning):
            return self.request.fault(
                path, f"more pixels than the {MAX_PIXELS} allowed ({err}); scale it down"
            )
        return self.request.fault(path, f"not a readable image ({err}); replace or remove the file")


def to_rgb(image: Pillow.Image) -> Image:
    """Decode to uint8 [H, W, 3], upright; 16-bit greys keep their upper byte."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        grey = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {upright.mode!r}; save it with 8 or 16 bits a channel")
    return np.asarray(upright.convert("RGB"), dtype=np.uint8)


def read_folder(path: Path, request: Request) -> Examples:
    """Read `folder:PATH`; a class is a folder, hidden ones and other files are passed over. Raises DataError."""
    paths: list[str] = []
    names: list[str] = []
    ignored = 0
    for folder in _class_folders(path, request):
        try:
            files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
        except OSError as err:
            raise request.fault(
                folder, f"cannot be read ({err.strerror}); check its rights"
            ) from err
        images = [str(f) for f in files if f.suffix.lower() in EXTENSIONS and f.is_file()]
        if request.listed is not None:
            images = [path for path in images if path in request.listed]
        elif not images:
            raise request.fault(
                folder,
                f"the class folder has no image; add files ({', '.join(EXTENSIONS)}) or remove it",
            )
        ignored += len(files) - len(images) if request.listed is None else 0
        paths += images
        names += [folder.name] * len(images)
    if ignored:
        log.warning("%s: passed over %d entries that are not images", path, ignored)
    items = FolderItems(request, paths)
    examples = build(request, path, "image", items=items, names=names)
    for key in examples.keys:
        items.verify(int(key))
    return examples


def _class_folders(path: Path, request: Request) -> list[Path]:
    if not path.is_dir():
        raise request.fault(path, "not a folder; give the folder that holds one folder a class")
    try:
        entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    except OSError as err:
        raise request.fault(path, f"cannot be read ({err.strerror}); check its rights") from err
    if not entries:
        raise request.fault(path, "the folder is empty; add one folder of images a class")
    folders = [p for p in entries if p.is_dir()]
    if not folders:
        raise request.fault(
            path,
            f"{len(entries)} files but no class folder; sort the images into one folder a class",
        )
    return folders
