"""Images from a folder with one folder a class: which files are read, what is passed over, and what white is in them.

At roll call every file is looked at (image_files.py), so that a broken one is named before training
and the pixels' range is that of all files (pixels.py). What is passed over is told in notes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.core.class_names import normal
from fedsplit.core.foreign import printable
from fedsplit.training.data.examples import Examples, Request, build
from fedsplit.training.data.image_files import ImageFiles, look_at, range_of
from fedsplit.training.data.image_table import read_image_table

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pnm",
)  # fmt: skip
_SPLITS = frozenset(
    {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
)
_SHOWN = 5


@dataclass
class _Found:
    """The files of the class folders, and what was passed over."""

    paths: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    """Extension -> files that are not read."""
    deeper: Counter[str] = field(default_factory=Counter)
    """Folder below a class -> images in it."""
    closed: list[OSError] = field(default_factory=list)
    """Why folders below could not be counted."""
    notes: list[str] = field(default_factory=list)


def read_folder(path: Path, request: Request) -> Examples:
    """Read `folder:PATH`; a class is a folder, what else lies there is told. Numbers are in a table. Raises DataError."""
    if request.target == "number":
        return _read_numbers(path, request)
    found = _Found()
    for folder in _class_folders(path, request, found):
        _add_class(folder, request, found)
    _note_spellings(found)
    _note_deeper(found)
    if found.other:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.other.items()))
        found.notes.append(
            f"files that are not read, by extension: {printable(kinds)}; read are {' '.join(EXTENSIONS)}"
        )
    items = ImageFiles(request, found.paths, request.pixel_max)
    examples = build(request, path, "image", items=items, names=found.names)
    if request.listed is not None:
        # Looked at when it was listed, and its range told then.
        return examples
    return _checked(examples, items, found.names, request, path, found.notes)


def _read_numbers(path: Path, request: Request) -> Examples:
    table = read_image_table(path, request, EXTENSIONS)
    items = ImageFiles(request, table.paths, request.pixel_max)
    examples = build(request, path, "image", items=items, names=table.labels)
    if request.listed is not None:
        return examples
    return _checked(examples, items, table.labels, request, path, table.notes)


def _checked(
    examples: Examples,
    items: ImageFiles,
    names: list[str],
    request: Request,
    path: Path,
    notes: list[str],
) -> Examples:
    """The examples with the range of all their files, without the broken ones where that is allowed."""
    keys = [int(key) for key in examples.keys]
    seen = dict(zip(keys, look_at(items, keys), strict=True))
    broken = {key: one.fault for key, one in seen.items() if one.fault is not None}
    if broken:
        first = next(iter(broken.values()))
        shown = "; ".join(printable(items.paths[key], limit=200) for key in list(broken)[:_SHOWN])
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        if not request.leave_out_broken:
            if len(broken) == 1:
                raise first
            raise request.fault(
                path,
                f"{len(broken)} files cannot be read: {shown}{more}; the first says: {first}. Replace or remove them, or "
                f"set broken-files=leave-out",
            )
        notes.append(
            f"{len(broken)} broken files are left out (broken-files=leave-out): {shown}{more}"
        )
        # Of those looked at alone: with max-samples the others must not come in now, unseen.
        good = [key for key in keys if key not in broken]
        items = ImageFiles(request, [items.paths[key] for key in good], items.white)
        examples = build(request, path, "image", items=items, names=[names[key] for key in good])
        seen = {place: seen[key] for place, key in enumerate(good)}
    several = [key for key, one in seen.items() if one.pages > 1]
    if several:
        notes.append(
            f"{len(several)} files have more than one page or frame, of which the first alone is used, e.g. "
            f"{printable(items.paths[several[0]], limit=150)}"
        )
    white, more_notes = range_of(list(seen.values()), request, path)
    items = ImageFiles(request, items.paths, white)
    return examples.with_notes(items, pixel_max=white or 255.0, notes=(*notes, *more_notes))


def _add_class(folder: Path, request: Request, found: _Found) -> None:
    try:
        files = sorted(f for f in folder.iterdir() if not f.name.startswith("."))
        images = [str(f) for f in files if f.suffix.lower() in EXTENSIONS and f.is_file()]
        folders = [f for f in files if f.is_dir()]
    except OSError as err:
        raise request.fault(folder, f"cannot be read ({err.strerror}); check its rights") from err
    if request.listed is not None:
        images = [path for path in images if path in request.listed]
    else:
        _count_deeper(folder, folders, found)
        if not images:
            below = sum(n for at, n in found.deeper.items() if at.startswith(f"{folder.name}/"))
            cure = (
                f"its {below} images lie deeper; move them up one folder"
                if below
                else f"add files ({', '.join(EXTENSIONS)}) or remove it"
            )
            raise request.fault(folder, f"the class folder has no image; {cure}")
        known = {*images, *map(str, folders)}
        found.other.update(f.suffix.lower() or "no extension" for f in files if str(f) not in known)
    found.paths += images
    found.names += [folder.name] * len(images)


def _count_deeper(folder: Path, folders: Sequence[Path], found: _Found) -> None:
    """Count images in folders below a class folder, which are not read."""
    for below in folders:
        count = 0
        for _, _, names in os.walk(below, onerror=found.closed.append):
            count += sum(Path(name).suffix.lower() in EXTENSIONS for name in names)
        if count:
            found.deeper[f"{folder.name}/{below.name}"] = count


def _note_deeper(found: _Found) -> None:
    # One note, however many folders: there is room for few.
    if found.deeper:
        shown = printable(", ".join(list(found.deeper)[:_SHOWN]), limit=200)
        more = len(found.deeper) - _SHOWN
        found.notes.append(
            f"{found.deeper.total()} images lie deeper, in {shown}{f' and {more} more folders' if more > 0 else ''}, and are "
            f"not read; move them up one folder"
        )
    if found.closed:
        found.notes.append(
            f"{len(found.closed)} folders below cannot be looked into, e.g. {printable(found.closed[0], limit=200)}"
        )


def _note_spellings(found: _Found) -> None:
    spelled: dict[str, set[str]] = {}
    for name in set(found.names):
        spelled.setdefault(normal(name), set()).add(name)
    for name, ways in sorted(spelled.items()):
        if len(ways) > 1:
            found.notes.append(f"{len(ways)} folders are one class {printable(name, limit=60)!r}: their names differ in Unicode's form or in blanks alone")  # fmt: skip


def _class_folders(path: Path, request: Request, found: _Found) -> list[Path]:
    if not path.is_dir():
        raise request.fault(path, "not a folder; give the folder that holds one folder a class")
    try:
        entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        folders = [p for p in entries if p.is_dir()]
    except OSError as err:
        raise request.fault(path, f"cannot be read ({err.strerror}); check its rights") from err
    if not entries:
        raise request.fault(path, "the folder is empty; add one folder of images a class")
    if not folders:
        raise request.fault(
            path,
            f"{len(entries)} files but no class folder; sort the images into one folder a class",
        )
    for folder in folders:
        _check_name(folder, request)
    _check_splits(path, folders, request)
    loose = [p.name for p in entries if p.suffix.lower() in EXTENSIONS and p not in folders]
    if loose and request.listed is None:
        shown = printable(", ".join(loose[:_SHOWN]), limit=150)
        found.notes.append(
            f"{len(loose)} images lie beside the class folders and are not read: {shown}; move them into a class folder"
        )
    return folders


def _check_name(folder: Path, request: Request) -> None:
    """Raise DataError for a name whose bytes are no UTF-8."""
    try:
        folder.name.encode()
    except UnicodeEncodeError as err:
        raw = os.fsencode(folder.name)
        meant = ""
        for encoding in ("cp932", "euc_jp"):
            try:
                meant = f", in {encoding} they are {printable(raw.decode(encoding), limit=60)!r}"
                break
            except UnicodeDecodeError:
                continue
        raise request.fault(
            folder, f"the bytes of the folder's name are not UTF-8{meant}; rename the folder"
        ) from err


def _check_splits(path: Path, folders: Sequence[Path], request: Request) -> None:
    """Raise DataError where folders are parts of a data set and no classes, unless the task says that they are."""
    names = {folder.name.lower() for folder in folders} & _SPLITS
    declared = {name.lower() for name in request.classes or ()}
    if len(names) < 2 or names <= declared or request.listed is not None:
        return
    inner = [f for f in folders if f.name.lower().startswith("train")]
    try:
        deeper = any(p.is_dir() for p in inner[0].iterdir()) if inner else False
    except OSError:
        deeper = False
    cure = (
        f"give {inner[0].name} alone (folder:{printable(inner[0])}), for each site splits its samples by itself"
        if deeper
        else "sort the images into one folder a class, or name them in classes if they are"
    )
    raise request.fault(
        path, f"{', '.join(sorted(names))} are parts of a data set and no classes; {cure}"
    )
