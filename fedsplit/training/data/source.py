"""From a source's spec to `Examples`: digits | folder:PATH | csv:PATH | jsonl:PATH | npz:PATH | hf:NAME.

The readers live in folder.py, tables.py, arrays.py and hub.py; this file only chooses one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.scores import Target
from fedsplit.training.data.arrays import read_digits, read_npz
from fedsplit.training.data.examples import Examples, Request
from fedsplit.training.data.folder import read_folder
from fedsplit.training.data.hub import read_hub
from fedsplit.training.data.tables import read_csv, read_jsonl

SOURCES = ("digits", "folder:PATH", "csv:PATH", "jsonl:PATH", "npz:PATH", "hf:NAME")

_FILES: dict[str, Callable[[Path, Request], Examples]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "npz": read_npz,
}


def load_source(
    spec: str,
    *,
    site: str,
    classes: tuple[str, ...] | None = None,
    max_samples: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    pixel_max: float = 0.0,
    leave_out_broken: bool = False,
    target: Target = "class",
    listed: frozenset[str] | None = None,
) -> Examples:
    """Read a site's labelled samples; images stay on disk until they are asked for.

    `classes` are the task's, in its order; without them the sorted names that occur. `max_samples` keeps a
    fixed random choice of that many. `pixel_max` is the value of white; 0: found out from all images. With
    `leave_out_broken` files that cannot be read are left out and told. `listed` are the paths of the only files to look at,
    where it is a folder. With `target=number` a label is a number; a folder has them in a table. A relative PATH starts at
    the working directory, `~` is the home.

    Raises ConfigError for an unknown spec and DataError, naming site and file, for data that cannot be used.
    """
    request = Request(
        site,
        classes,
        max_samples,
        text_column,
        label_column,
        pixel_max,
        leave_out_broken,
        target,
        listed,
    )
    name, _, argument = spec.partition(":")
    if spec == "digits":
        return read_digits(request)
    if name not in {*_FILES, "folder", "hf"} or not argument.strip() or "\0" in argument:
        raise ConfigError(
            f"site {site!r}: data source {spec[:200]!r} is not known; {_meant(spec)}use one of {', '.join(SOURCES)}"
        )
    if name == "hf":
        return read_hub(argument, request)
    path = Path(argument).expanduser().absolute()
    try:
        there = path.exists()
    except OSError as err:
        raise request.fault(
            path, f"cannot be looked at ({err.strerror}); check path and rights"
        ) from err
    if not there:
        raise request.fault(path, "does not exist; check the path in the site's data setting")
    if name == "folder":
        return read_folder(path, request)
    if not path.is_file():
        raise request.fault(path, f"not a file; {name}: reads one file, folder: reads a folder")
    return _FILES[name](path, request)


def stamp(spec: str) -> str:
    """What changes when a file of a source does, or comes or goes: a key for what was read of it. Reads no file.

    Empty where nothing on this machine can be looked at: `digits`, the hub.
    """
    name, _, argument = spec.partition(":")
    if name not in {*_FILES, "folder"} or "\0" in argument:
        return ""
    path = str(Path(argument).expanduser().absolute())
    found = hashlib.blake2b(digest_size=16)
    for line in [*_states(path)] if name == "folder" else [_state(path, lambda: Path(path).stat())]:
        found.update(line.encode(errors="surrogateescape"))
    return found.hexdigest()


def _states(folder: str, *, links: bool = True) -> Iterator[str]:
    """The states of all that lies below, and with `links` also behind the folders of classes that are links."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as err:
        yield f"{folder}\0{err.errno}\n"
        return
    for entry in inside:
        yield _state(entry.path, entry.stat)
        if entry.is_dir(follow_symlinks=links):
            yield from _states(entry.path, links=False)


def _state(path: str, stat: Callable[[], os.stat_result]) -> str:
    try:
        info = stat()
    except OSError as err:
        return f"{path}\0{err.errno}\n"
    # The last two are not to be set at will: a file of the same size may be given the old time of change.
    return f"{path}\0{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}\n"


def _meant(spec: str) -> str:
    """A guess where the spec is a path without its kind; else nothing."""
    path = Path(spec).expanduser()
    try:
        kind = (
            "folder" if path.is_dir() else path.suffix.lstrip(".").lower() if path.is_file() else ""
        )
    except (OSError, ValueError):
        return ""
    return f"did you mean {kind}:{spec}? Else " if kind in {"folder", *_FILES} else ""
