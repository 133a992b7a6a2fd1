"""Images from arrays: a `.npz` file, or scikit-learn's digits. Held in memory as they come.

An npz is a zip of arrays, so each member's claimed size is checked against caps and against its own
header before anything is allocated, and pickled objects are never loaded.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedsplit.core.extras import extra
from fedsplit.model.inputs import Inputs
from fedsplit.training.data.examples import Examples, Image, Index, Request, build, digest_of
from fedsplit.training.data.pixels import range_notes, scaled, white_of

MAX_ARRAY_BYTES = 2 * 2**30
"""Decompressed; a compressed npz can claim a thousand times its size on disk."""

_ARRAYS = frozenset({"x", "y", "classes", "groups"})
_NPZ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RecursionError,
    RuntimeError,
    UserWarning,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, eq=False)
class ArrayItems:
    """Images in one array [N, H, W] or [N, H, W, C]; `white` is the value that becomes 255."""

    array: NDArray[Any]
    white: float
    where: str

    def get(self, i: int) -> Image:
        """Image `i` as uint8 RGB; grey is repeated, a fourth channel dropped."""
        return scaled(self.array[i], self.white)

    def origin(self, i: int) -> str:
        """Array and position."""
        return f"{self.where}[{i}]"

    def digest(self, i: int) -> int:
        """Of the values as the file has them."""
        return digest_of(self.array[i].tobytes())

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return int(self.array.nbytes)


def read_digits(request: Request) -> Examples:
    """Read `digits`: 1,797 scans of handwritten digits, 8x8, values 0 .. 16, part of scikit-learn."""
    with extra("simulation", "data=digits"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    items = ArrayItems(np.asarray(bunch.images), 16, "digits")
    names = [str(int(label)) for label in bunch.target]
    examples = build(request, "digits", "image", items=items, names=names)
    return examples.with_notes(items, pixel_max=16, notes=())


def read_npz(path: Path, request: Request) -> Examples:
    """Read `npz:PATH`: `x` uint8 or float [N, H, W(, C)], `y` [N] int or str (or float for numbers), optional `classes` [K] str.

    Floats are 0 .. 1 where none is above 1 by more than a hundredth, else 0 .. 255; `x` may be uint16, too. Without `classes` an int label's name is its
    digits. An optional `groups` [N] int or str says which samples belong together. Raises DataError.
    """
    arrays = _load(path, request)
    for name in ("x", "y"):
        if name not in arrays:
            raise request.fault(
                path,
                f"no array {name!r} among {sorted(arrays)}; save it with np.savez(x=..., y=...)",
            )
    x, y = arrays["x"], arrays["y"]
    _check_images(path, request, x)
    white, notes = _range(path, request, x)
    if y.shape != x.shape[:1]:
        raise request.fault(
            path, f"y has shape {y.shape}, x {x.shape}; y must hold one label for each image"
        )
    items = ArrayItems(x, white, f"{path}[x]")
    names = _label_names(path, request, y, arrays.get("classes"))
    groups = _group_numbers(path, request, len(y), arrays.get("groups"))
    examples = build(request, path, "image", items=items, names=names, groups=groups)
    return examples.with_notes(items, pixel_max=white, notes=notes)


def read_images(path: Path, inputs: Inputs) -> tuple[NDArray[Any], float, list[str]]:
    """The images `x` of an npz file without labels, their value of white, and what there is to say of it. Raises DataError.

    `inputs` are a run's: its value of white holds here, where the file has not bytes, which say it themselves.
    """
    request = Request(site="")
    arrays = _load(path, request)
    if "x" not in arrays:
        raise request.fault(
            path, f"no array 'x' among {sorted(arrays)}; save the images with np.savez(x=...)"
        )
    x = arrays["x"]
    _check_images(path, request, x)
    stated, largest = inputs.pixel_max, float(x.max()) if x.size else 0.0
    bytes_, floats = x.dtype == np.uint8, x.dtype.kind == "f"
    # A range of bytes, of floats and of deeper values are not each other's.
    if (bytes_ and stated > 255) or stated <= 1 < largest or (floats and largest <= 1.01 < stated):
        stated = 0.0
    white, notes = _range(path, replace(request, pixel_max=stated), x)
    return x, white, notes


def _group_numbers(
    path: Path, request: Request, count: int, groups: NDArray[Any] | None
) -> Index | None:
    """0 .. G-1 for each sample, None where the file has no groups."""
    if groups is None:
        return None
    if groups.shape != (count,):
        raise request.fault(
            path,
            f"groups has shape {groups.shape}; it must hold one group for each of {count} images",
        )
    if groups.dtype.kind not in "iuU":
        raise request.fault(path, f"groups is {groups.dtype}; save groups as integers or strings")
    if groups.dtype.kind == "U":
        groups = np.char.strip(groups)
        if len(empty := np.flatnonzero(groups == "")):
            raise request.fault(
                f"{path}[groups][{empty[0]}]", "the group is empty; name the group of every image"
            )
    numbers: Index = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return numbers


def _check_images(path: Path, request: Request, x: NDArray[Any]) -> None:
    """Check dtype and shape of `x`. Raises DataError."""
    channels = x.shape[3] if x.ndim == 4 else 1
    if x.ndim not in {3, 4} or channels not in {1, 3, 4} or 0 in x.shape[1:]:
        raise request.fault(
            path,
            f"x has shape {x.shape}; it must be [N, H, W] or [N, H, W, C] with 1, 3 or 4 channels",
        )
    if x.dtype not in (np.uint8, np.uint16) and x.dtype.kind != "f":
        raise request.fault(path, f"x is {x.dtype}; save it as uint8, uint16 or float")


def _range(path: Path, request: Request, x: NDArray[Any]) -> tuple[float, list[str]]:
    """The value of white in `x`, and what there is to say of it. Raises DataError where nothing tells it."""
    floats = x.dtype.kind == "f"
    low, largest = (float(x.min()), float(x.max())) if x.size else (0.0, 255.0)
    if not (low >= 0 and np.isfinite(largest)):
        raise request.fault(
            path, f"x lies in {low:g} .. {largest:g}; pixels must not be negative, NaN or infinite"
        )
    if request.pixel_max:
        white: float | None = request.pixel_max
    else:
        white = 255.0 if x.dtype == np.uint8 else white_of(largest, floats=floats)
    if white is None:
        raise request.fault(
            path,
            f"x lies in {low:g} .. {largest:g}, and nothing says which value is white; floats are read as 0 .. 1 or "
            f"0 .. 255, for others set pixel-max",
        )
    stated = bool(request.pixel_max)
    return white, range_notes(white=white, largest=largest, stated=stated, floats=floats)


def _label_names(
    path: Path, request: Request, y: NDArray[Any], classes: NDArray[Any] | None
) -> Sequence[str]:
    if classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1):
        raise request.fault(
            path, f"classes is {classes.dtype} {classes.shape}; it must be a list of strings"
        )
    if y.dtype.kind == "U":
        return [str(name).strip() for name in y]
    if request.target == "number" and y.dtype.kind in "iuf":
        # As they are, whatever names of classes the file holds.
        return [repr(value) for value in y.tolist()]
    if y.dtype.kind not in "iu":
        raise request.fault(path, f"y is {y.dtype}; save labels as integers or strings")
    if classes is None:
        return [str(int(label)) for label in y]
    known = [str(name).strip() for name in classes]
    for i, label in enumerate(y):
        if not 0 <= int(label) < len(known):
            raise request.fault(
                f"{path}[y][{i}]",
                f"label {int(label)} has no name: 'classes' holds {len(known)}; correct y or classes",
            )
    return [known[int(label)] for label in y]


def _load(path: Path, request: Request) -> dict[str, NDArray[Any]]:
    """The arrays x, y, classes and groups, as far as they are there."""
    found: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name not in _ARRAYS or info.filename == name:
                    continue
                if info.file_size > MAX_ARRAY_BYTES:
                    raise request.fault(
                        path,
                        f"{name!r} takes {info.file_size} bytes, more than the {MAX_ARRAY_BYTES} "
                        "allowed; split the file",
                    )
                with archive.open(info) as header:
                    _check_header(header, info.file_size)
                with archive.open(info) as member:
                    found[name] = npy.read_array(member, allow_pickle=False)
    except _NPZ_ERRORS as err:
        reason = str(err)[:300] or type(err).__name__
        raise request.fault(
            path, f"not a usable npz file ({reason}); write it with np.savez, without objects"
        ) from err
    return found


def _check_header(member: IO[bytes], size: int) -> None:
    """Raise ValueError unless the array that a member's header announces is as large as the member."""
    major, _ = npy.read_magic(member)
    read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    count = 1
    for side in shape:
        if side < 0:
            raise ValueError(f"its shape is {shape}")
        count *= side
    if count * dtype.itemsize != size - member.tell():
        raise ValueError(f"its header announces {shape} {dtype}, which is not what follows")
