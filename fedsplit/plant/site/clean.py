"""What a site keeps, how much it is, and what of it goes: by the retention settings of site.toml.

    runs        state/: what a site keeps of a run between its rounds, and the lists of a run's samples
    sides       state/: which samples test, for good: never removed, for what has taught must never test
    logs        logs/: JSON lines, turned over
    backbones   backbones/: the tensors of the site's cut, by digest
    modules     modules/: versions of the module, the one in use among them
    usage       usage/: how often each class was answered, a day
    remains     of joins and renewals that were broken off

A running site removes old runs and logs by itself, at its start and daily (`keep_bounded`); it loads no torch for that.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import read_json
from fedsplit.plant.site import keys
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.predict.usage import FOLDER as USAGE

Kind = Literal["runs", "sides", "logs", "backbones", "modules", "usage", "remains"]
KINDS: tuple[Kind, ...] = ("runs", "sides", "logs", "backbones", "modules", "usage", "remains")
_RUN_FILES = ("*.safetensors", "*.list.npz")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENSORS = "tensors"
_REMAIN_S = 24 * 3600.0
"""What is being written is younger."""


@dataclass(frozen=True)
class Kept:
    """One thing that is kept."""

    kind: Kind
    path: Path
    bytes: int
    changed: float
    """Seconds since the epoch."""
    goes: str = ""
    """Why it goes by the settings; empty where it stays."""


def kept(folder: SiteFolder, *, all_backbones: bool = False) -> list[Kept]:
    """Everything that a site keeps beside its settings and keys. Reads sizes alone."""
    return [
        *_runs(folder),
        *_logs(folder),
        *_backbones(folder, every=all_backbones),
        *kept_modules(folder),
        *_usage(folder),
        *_remains(folder),
    ]


def remove(folder: SiteFolder, found: list[Kept]) -> tuple[int, list[str]]:
    """Remove what goes. Gives the bytes that are freed, and what could not be removed."""
    freed, faults = 0, []
    for one in found:
        if not one.goes or one.kind == "backbones":
            continue
        try:
            _delete(one.path)
            freed += one.bytes
        except OSError as err:
            faults.append(f"{one.path} cannot be removed ({err.strerror}); correct its rights")
    backbones = [one for one in found if one.kind == "backbones" and one.path.name != _TENSORS]
    if any(one.goes for one in backbones):
        # Loads torch: not in the process of a site that runs.
        from fedsplit.model.store import BackboneStore

        try:
            stays = [one.path.name for one in backbones if not one.goes]
            freed += BackboneStore(folder.backbones).prune(stays)
        except BackboneError as err:
            faults.append(str(err))
        except OSError as err:  # its lock
            faults.append(
                f"{folder.backbones} cannot be changed ({err.strerror}); correct its rights"
            )
    return freed, faults


def keep_bounded(folder: SiteFolder, say: Callable[[str], None]) -> None:
    """Remove the runs and logs beyond the settings, and remains."""
    found = [one for one in kept(folder) if one.kind != "backbones"]
    gone = [one for one in found if one.goes]
    freed, faults = remove(folder, gone)
    if gone:
        say(f"{len(gone)} old files were removed by the retention settings ({freed / 1e6:,.1f} MB)")
    for fault in faults:
        say(fault)


def _runs(folder: SiteFolder) -> Iterator[Kept]:
    files = {path for pattern in _RUN_FILES for path in folder.kept.glob(pattern)}
    found = sorted((one for p in files if (one := _looked("runs", p))), key=lambda k: -k.changed)
    most = folder.settings.retention.runs
    # A run has at most one file of each kind for a task.
    for pattern in _RUN_FILES:
        alike = [one for one in found if one.path.match(pattern)]
        for place, one in enumerate(alike):
            yield one if place < most else _going(one, f"older than the {most} newest")
    for path in folder.kept.glob("*.sides.npz"):
        if one := _looked("sides", path):
            yield one


def _logs(folder: SiteFolder) -> Iterator[Kept]:
    most = folder.settings.retention.log_mb * 1_000_000
    by_process: dict[str, list[Kept]] = {}
    for path in folder.logs.glob("*.jsonl*"):
        if one := _looked("logs", path):
            by_process.setdefault(path.name.partition(".")[0], []).append(one)
    for files in by_process.values():
        total = 0
        # The one that is written to has no number.
        for one in sorted(files, key=lambda k: (not k.path.name.endswith(".jsonl"), -k.changed)):
            total += one.bytes
            over = total > most and not one.path.name.endswith(".jsonl")
            yield _going(one, f"beyond {most / 1e6:g} MB of this process") if over else one


def _backbones(folder: SiteFolder, *, every: bool) -> Iterator[Kept]:
    there = [p for p in folder.backbones.glob("*") if p.is_dir() and _DIGEST.fullmatch(p.name)]
    found = sorted(
        (one for p in there if (one := _looked("backbones", p))), key=lambda k: -k.changed
    )
    for place, one in enumerate(found):
        # The federation's as it was when the site joined, and the one that came last: a run's.
        in_use = one.path.name == folder.settings.site.backbone_sha256 or place == 0
        if every:
            yield _going(one, "all backbones were asked for")
        else:
            yield one if in_use else _going(one, "no longer in use")
    if one := _looked("backbones", folder.backbones / _TENSORS):
        yield _going(one, "with their backbones") if every else one


def kept_modules(folder: SiteFolder) -> Iterator[Kept]:
    """The versions of the module: the one in use and the ones before it, which a rollback goes back to."""
    try:
        in_use = set(read_json(folder.current_modules, limit=1 << 16).values())
    except (OSError, ValueError, AttributeError):
        in_use = set()
    there = [p for p in folder.modules.glob("*") if p.is_dir() and _DIGEST.fullmatch(p.name)]
    found = sorted(
        (one for p in there if (one := _looked("modules", p))),
        key=lambda k: (k.path.name not in in_use, -k.changed),
    )
    most = folder.settings.retention.modules
    gone = {one.path.name for one in found[most:]}
    for one in found:
        yield _going(one, f"older than the {most} newest") if one.path.name in gone else one
    for path in folder.modules.glob("*.expected.json"):
        # With its module, which somebody else may have removed.
        digest = path.name.partition(".")[0]
        if (folder.modules / digest).is_dir() and digest not in gone:
            continue
        if aside := _looked("modules", path):
            yield _going(aside, "with its module")


def _usage(folder: SiteFolder) -> Iterator[Kept]:
    for path in (folder.path / USAGE).glob("*.json"):
        if one := _looked("usage", path):
            yield one


def _remains(folder: SiteFolder) -> Iterator[Kept]:
    for pattern in (keys.JOINING, ".*.part", "run/.*.part", "state/*.part", "modules/.*.part"):
        for path in folder.path.glob(pattern):
            one = _looked("remains", path)
            if one and time.time() - one.changed > _REMAIN_S:
                yield _going(one, "broken off")


def _looked(kind: Kind, path: Path) -> Kept | None:
    try:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return Kept(kind, path, sum(p.stat().st_size for p in files), path.stat().st_mtime)
    except OSError:  # gone meanwhile
        return None


def _going(one: Kept, why: str) -> Kept:
    return Kept(one.kind, one.path, one.bytes, one.changed, why)


def _delete(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _delete(child)
        path.rmdir()
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
