"""Images with a number each: a folder with a table `labels.csv`, which names a file and its number in each line.

What folder:PATH is where the target is a number. Images may lie in folders below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from fedsplit.core.foreign import printable
from fedsplit.training.data.examples import Request
from fedsplit.training.data.numbers import read_numbers
from fedsplit.training.data.tables import read_rows

TABLE, FILE_COLUMN = "labels.csv", "file"
_SHOWN = 5


@dataclass(frozen=True)
class ImageTable:
    """The files of the table, and their labels as the table has them."""

    paths: list[str]
    labels: list[str]
    notes: list[str]


def read_image_table(folder: Path, request: Request, extensions: tuple[str, ...]) -> ImageTable:
    """Read PATH/labels.csv. Raises DataError for a line whose file is missing, outside, no image or there twice."""
    table = folder / TABLE
    if not table.is_file():
        raise request.fault(
            folder,
            f"there is no {TABLE}; target=number wants this table in the folder, with the columns {FILE_COLUMN!r} (an image, "
            f"relative to the folder) and {request.label_column!r} (its number)",
        )
    rows = read_rows(table, replace(request, text_column=FILE_COLUMN))
    read_numbers(request, rows.names, rows.items)
    found = ImageTable([], [], rows.notes)
    seen: dict[str, int] = {}
    for i, (name, label) in enumerate(zip(rows.items.texts, rows.names, strict=True)):
        path = _path(folder, name.strip(), request, rows.items.origin(i), extensions)
        if path is None:
            continue
        if path in seen:
            raise request.fault(
                rows.items.origin(i),
                f"{printable(name, limit=200)} stands in line {rows.items.lines[seen[path]]} too; name each file once",
            )
        seen[path] = i
        found.paths.append(path)
        found.labels.append(label)
    _note_others(folder, seen, extensions, found)
    return found


def _path(
    folder: Path, name: str, request: Request, line: str, extensions: tuple[str, ...]
) -> str | None:
    """The file of a line; None where it was not there at roll call, or has gone since."""
    relative = PurePosixPath(name.replace("\\", "/"))
    path = folder / relative
    if request.listed is not None:
        return str(path) if str(path) in request.listed and path.is_file() else None
    shown = printable(name, limit=200)
    if relative.is_absolute() or ".." in relative.parts or Path(name).is_absolute():
        raise request.fault(
            line, f"{shown} is no path within the folder; give it relative to the folder"
        )
    if path.suffix.lower() not in extensions:
        raise request.fault(
            line, f"{shown} is no image file ({', '.join(extensions)}); correct the name"
        )
    try:
        there = path.is_file()
    except (OSError, ValueError):
        there = False
    if not there:
        raise request.fault(
            line, f"{shown} is not in the folder; correct the name or remove the line"
        )
    return str(path)


def _note_others(
    folder: Path, seen: dict[str, int], extensions: tuple[str, ...], found: ImageTable
) -> None:
    """Say it where images lie there that no line names."""
    others = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in extensions and str(path) not in seen
    ]
    if others:
        shown = printable(", ".join(others[:_SHOWN]), limit=200)
        found.notes.append(
            f"{len(others)} images are not in {TABLE} and are not read, e.g. {shown}"
        )
