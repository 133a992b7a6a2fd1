"""What a person gives to be predicted, as a stream of single inputs: files, folders, tables, arrays, stdin.

Nothing is decoded here and no labels are needed: an `Input` is a name that the person knows and a sample for
`Predictor.prepare`. Folders are walked as they are read, so 100,000 photos take no memory. A fault of one input stands in
its place; what concerns a whole source (no such file, no image in a folder) is raised before anything is predicted.
Tables and lines of text are rows.py's.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fedsplit.core.errors import DataError
from fedsplit.core.foreign import printable
from fedsplit.predict import rows
from fedsplit.predict.images import fault
from fedsplit.predict.source import Input, Reading, Source
from fedsplit.training.data.folder import EXTENSIONS
from fedsplit.training.data.image_files import MAX_FILE_BYTES
from fedsplit.training.data.source import load_source

STDIN = "-"
_ARRAYS, _DIGITS = ".npz", "digits"
_KINDS = ("folder:", "csv:", "jsonl:", "npz:")
_SHOWN = 5


def sources(
    given: Sequence[str], reading: Reading, *, stdin: BinaryIO | None = None
) -> list[Source]:
    """The sources of the command's arguments, looked at but not read. Raises DataError, for all of them at once."""
    found: list[Source] = []
    faults: list[str] = []
    if list(given).count(STDIN) > 1:
        raise DataError(f"{STDIN} (stdin) is given more than once; it can be read once")
    for name in given:
        try:
            found.append(_source(name, reading, stdin))
        except DataError as err:
            faults.append(str(err))
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        lines = "".join(f"\n  - {text}" for text in faults[:50])
        more = f"\n  and {len(faults) - 50} more" if len(faults) > 50 else ""
        raise DataError(
            f"{len(faults)} inputs cannot be read, and nothing was predicted:{lines}{more}"
        )
    return found


def _source(name: str, reading: Reading, stdin: BinaryIO | None) -> Source:
    if name == STDIN:
        stream = stdin or sys.stdin.buffer
        if reading.kind == "text":
            return Source(None, lambda: rows.lines(stream, "stdin"))
        return Source(1, lambda: iter([_image_of(stream)]))
    path = _path(name)
    if path is None:
        return _digits(reading)
    if path.is_dir():
        return _folder(path, reading)
    if path.suffix.lower() in rows.TABLES:
        return rows.table(path, reading)
    if path.suffix.lower() == _ARRAYS:
        return _arrays(path, reading)
    if reading.kind == "text":
        if path.suffix.lower() in EXTENSIONS:
            raise fault(
                path, "an image, and the module reads texts; give texts, or a module of images"
            )
        return rows.text_file(path)
    return Source(1, lambda: iter([Input(str(path), path)]))


def _path(name: str) -> Path | None:
    """The file or folder that is meant; None for `digits`. Raises DataError where it is not there."""
    path = Path(name).expanduser()
    try:
        if path.exists():
            return path
        if name == _DIGITS:
            return None
        # As the setting `data` names its sources.
        kind = next((k for k in _KINDS if name.startswith(k)), "")
        if kind and (path := Path(name[len(kind) :]).expanduser()).exists():
            return path
    except (OSError, ValueError, RuntimeError) as err:
        raise fault(
            name, f"cannot be looked at ({printable(err, limit=100)}); check path and rights"
        ) from err
    raise fault(
        name,
        f"there is no such file or folder; check the path (texts come from a .csv, .jsonl or .txt file, or from stdin as "
        f"{STDIN})",
    )


def _image_of(stream: BinaryIO) -> Input:
    raw = stream.read(MAX_FILE_BYTES + 1)
    if not raw:
        return Input(
            STDIN, fault="stdin is empty; give an image, e.g. fedsplit predict ... - < photo.png"
        )
    return Input(STDIN, raw)


# ---- folders


def _folder(path: Path, reading: Reading) -> Source:
    """All images below a folder. Raises DataError where there is none."""
    if reading.kind == "text":
        raise fault(
            path, "a folder, and the module reads texts; give a .csv, .jsonl or .txt file, or stdin"
        )
    other: Counter[str] = Counter()
    closed: list[OSError] = []
    total = sum(1 for _ in _images(path, other, closed))
    if not total:
        there = ", ".join(f"{count} {kind}" for kind, count in other.most_common(_SHOWN))
        why = f"; it has {printable(there)}" if there else "; it is empty"
        if closed:
            why = f"; {printable(closed[0], limit=200)}"
        raise fault(path, f"there is no image in it or below{why}. Read are {' '.join(EXTENSIONS)}")
    source = Source(total, lambda: (Input(name, Path(name)) for name in _images(path)))
    if other:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(other.items()))
        source.notes.append(
            f"{printable(path, limit=200)}: files that are not read, by extension: {printable(kinds)}"
        )
    if closed:
        source.notes.append(
            f"{len(closed)} folders cannot be looked into, e.g. {printable(closed[0], limit=200)}"
        )
    return source


def _images(
    top: Path, other: Counter[str] | None = None, closed: list[OSError] | None = None
) -> Iterator[str]:
    """Paths of the images below `top`, sorted within each folder; hidden names are passed over, links are followed once."""
    been: set[tuple[int, int]] = set()
    waiting = [str(top)]
    while waiting:
        folder = waiting.pop()
        try:
            info = Path(folder).stat()
            if (mark := (info.st_dev, info.st_ino)) in been:
                continue  # a link to a folder above
            been.add(mark)
            with os.scandir(folder) as entries:
                inside = sorted(
                    (e for e in entries if not e.name.startswith(".")), key=lambda e: e.name
                )
        except OSError as err:
            if closed is not None:
                closed.append(err)
            continue
        # Depth first, in the order of names, as a person lists a folder.
        waiting += [e.path for e in reversed(inside) if _is_folder(e)]
        for entry in inside:
            if _is_folder(entry):
                continue
            suffix = Path(entry.name).suffix.lower()
            if suffix in EXTENSIONS:
                yield entry.path
            elif other is not None:
                other[suffix or "no extension"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


# ---- arrays


def _arrays(path: Path, reading: Reading) -> Source:
    from fedsplit.training.data.arrays import ArrayItems, read_images

    _check_images(path, reading)
    x, white, notes = read_images(path, reading.inputs)
    items = ArrayItems(x, white, f"{path}[x]")
    found = (Input(items.origin(i), items.get(i)) for i in range(len(x)))
    return Source(
        len(x), lambda: found, [f"{printable(path, limit=200)}: {note}" for note in notes]
    )


def _digits(reading: Reading) -> Source:
    """scikit-learn's scans, for who tries it."""
    _check_images(_DIGITS, reading)
    examples = load_source(_DIGITS, site="")
    found = (Input(examples.origin(i), examples.image(i)) for i in range(len(examples)))
    return Source(len(examples), lambda: found)


def _check_images(where: object, reading: Reading) -> None:
    if reading.kind != "image":
        raise fault(where, "images, and the module reads texts; give texts, or a module of images")
