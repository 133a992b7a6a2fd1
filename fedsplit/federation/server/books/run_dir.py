"""Writes and reads `runs/<run>/`: config, metrics, status, checkpoints, module, summary. All or nothing.

A checkpoint is a folder that appears by one rename, with a manifest of sha256 digests: a process killed at
any instant leaves the last whole one. A full disk never loses the last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedsplit.core.aggregation import Tensors
from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.records import RoundMetrics, Status, Summary
from fedsplit.core.whole_files import whole_folder, write_whole

MODULE_FILE, EXTRA_FILE, MANIFEST, KEEP = (
    "module.safetensors",
    "extra.safetensors",
    "manifest.json",
    3,
)


try:
    import fcntl
except ImportError:  # Windows: nothing is held there
    fcntl = None  # type: ignore[assignment]


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder until the block ends or the process does, however it does; False where another one holds it."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # A file system without locks: nothing can be known there.
        yield mine
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Checkpoint:
    """The module after a round, and what is needed to go on from it."""

    round: int
    module: dict[str, NDArray[np.float32]]
    state: dict[str, Any]
    extra: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Tensors beside the module: moments of the server's optimiser, the best module so far."""


class RunDir:
    """One run's folder."""

    def __init__(self, path: Path, *, run: str = "") -> None:
        """`run`: whose the folder is where it is one task's in the folder of a run."""
        self.path = path
        self.name = run or path.name
        """The run's name, by which it is resumed."""
        self.label = f"{run}/{path.name}" if run else path.name
        """The name of what is in this folder; no other run or task has it."""
        self.on_status: Callable[[Status], None] = lambda _: None
        """Told each status that was written."""

    @cached_property
    def key(self) -> str:
        """A random word, made with the run and kept in config.json: a name may be given again, at another server too."""
        if not self.begun:
            return secrets.token_hex(8)
        try:
            return str(self.read_config().get("key", ""))
        except RunDirError:
            return ""  # who resumes the run says it better

    @classmethod
    def create(cls, runs: Path, name: str, *, task: str) -> RunDir:
        """A new folder under `runs`; an empty name becomes task and date. Raises RunDirError if it exists."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
        path = runs.expanduser().absolute() / (name or f"{task}-{stamp}")
        try:
            if path.exists() and (path / "config.json").exists():
                raise RunDirError(
                    f"run {path.name!r} is already in {path.parent}; choose another run-name, or go on "
                    f"from it with resume={path.name}"
                )
            # What is inside was learnt of people's data: for the account that runs this, until somebody opens it.
            fresh = not path.parent.exists()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if fresh:
                # Folders above have the usual mode, whatever `mode` says.
                path.parent.chmod(0o700)
        except OSError as err:
            raise RunDirError(
                f"run directory {path} cannot be written: {err.strerror}; set runs-dir to a folder that can "
                f"be written"
            ) from err
        return cls(path)

    @classmethod
    def reopen(cls, runs: Path, name: str) -> RunDir:
        """The folder of an earlier run. Raises RunDirError when it is not there."""
        path = runs.expanduser().absolute() / name
        if not (path / "config.json").is_file():
            there = sorted(p.parent.name for p in path.parent.glob("*/config.json"))
            raise RunDirError(
                f"there is no run {name!r} in {path.parent} to go on from; runs: {there}"
            )
        return cls(path)

    def of_task(self, task: str) -> RunDir:
        """The folder of one of the run's tasks. Raises RunDirError when it cannot be made."""
        path = self.path / task
        with _translated(self):
            path.mkdir(exist_ok=True)
        return RunDir(path, run=self.name)

    @contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Hold the folder: no other process writes here meanwhile. Raises RunDirError where one does."""
        with _locked(self.path) as mine:
            if not mine:
                raise RunDirError(
                    f"run {self.name!r} in {self.path.parent} is being written by another process now; wait for "
                    f"its end, or choose another run-name"
                )
            yield

    @property
    def busy(self) -> bool:
        """Does another process write here now?"""
        with _locked(self.path) as mine:
            return not mine

    @property
    def begun(self) -> bool:
        """Was a run ever begun here?"""
        return (self.path / "config.json").is_file()

    def read_summary(self) -> Summary | None:
        """The summary, if there is a whole one."""
        try:
            text = (self.path / "summary.json").read_text(encoding="utf-8")
            return Summary.model_validate_json(text)
        except (OSError, ValueError):
            return None

    def clear_unfinished(self) -> None:
        """Remove what a writer that was stopped left half done; only when nobody writes here any more."""
        for part in list(self.path.rglob(".*.part")):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)

    def write_json(self, name: str, value: Mapping[str, Any] | BaseModel) -> None:
        """Write a JSON file in one piece."""
        if isinstance(value, BaseModel):
            text = value.model_dump_json(indent=2)
        else:
            text = json.dumps(value, indent=2)
        with _translated(self):
            write_whole(self.path / name, text + "\n")

    def read_config(self) -> dict[str, Any]:
        """config.json. Raises RunDirError when it is damaged."""
        try:
            value: dict[str, Any] = read_json(self.path / "config.json")
            if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
                raise ValueError("it holds no settings")
        except (OSError, ValueError) as err:
            raise RunDirError(f"{self.path / 'config.json'} cannot be read: {err}") from err
        return value

    def forget(self, name: str) -> None:
        """Remove a file that is going to be written anew, if it is there."""
        with _translated(self):
            (self.path / name).unlink(missing_ok=True)

    def add_metrics(self, metrics: RoundMetrics) -> None:
        """Append one line to metrics.jsonl."""
        with (
            _translated(self),
            (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write(metrics.model_dump_json() + "\n")

    def read_metrics(self) -> list[RoundMetrics]:
        """All whole lines of metrics.jsonl. Raises RunDirError when one of them is damaged."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            # Bytes, for a killed process may leave half a character behind the last whole line.
            lines = path.read_bytes().split(b"\n")[:-1]
            return [RoundMetrics.model_validate_json(line) for line in lines if line.strip()]
        except (OSError, ValueError) as err:
            raise RunDirError(
                f"{path} has a line that cannot be read: {str(err)[:300]}; remove that line to go on"
            ) from err

    def forget_after(self, round_: int) -> None:
        """Drop metrics of rounds after `round_` and the summary: a resumed run writes them anew."""
        kept = [m for m in self.read_metrics() if m.round <= round_]
        with _translated(self):
            text = "".join(m.model_dump_json() + "\n" for m in kept)
            write_whole(self.path / "metrics.jsonl", text)
            (self.path / "summary.json").unlink(missing_ok=True)

    def set_status(self, status: Status) -> None:
        """Rewrite status.json."""
        self.write_json("status.json", status)
        self.on_status(status)

    def finish(self, summary: Summary) -> None:
        """Write summary.json."""
        self.write_json("summary.json", summary)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of a round, then drop all but the last few. Raises RunDirError."""
        root = self.path / "checkpoints"
        with _translated(self):
            with whole_folder(root / f"round-{checkpoint.round:05d}") as part:
                files = [part / MODULE_FILE]
                save_file(checkpoint.module, files[0])
                if checkpoint.extra:
                    files.append(part / EXTRA_FILE)
                    save_file(checkpoint.extra, files[1])
                manifest = {
                    "round": checkpoint.round,
                    "state": checkpoint.state,
                    "sha256": {file.name: _sha256(file) for file in files},
                }
                (part / MANIFEST).write_text(
                    json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
                )
                _flush(*files, part / MANIFEST)
            for old in _rounds(root)[:-KEEP]:
                shutil.rmtree(old, ignore_errors=True)

    def save_module(self, export: Callable[[Path], None]) -> None:
        """Let `export` write the trained module, then put it in the place of an older one. Raises RunDirError."""
        with _translated(self), whole_folder(self.path / "module") as part:
            export(part)

    @property
    def has_checkpoint(self) -> bool:
        """Was a round of this run ever finished?"""
        return bool(_rounds(self.path / "checkpoints"))

    def last_checkpoint(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Checkpoint:
        """The newest whole checkpoint, of a module of these `shapes`. Raises RunDirError when there is none."""
        damage = []
        for path in reversed(_rounds(self.path / "checkpoints")):
            try:
                found = _read_checkpoint(path)
                if shapes is not None:
                    _check_shapes(found.module, shapes)
                return found
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as err:
                damage.append(f"{path.name}: {err}")
        why = f"damaged: {'; '.join(damage)}" if damage else "no round was finished"
        raise RunDirError(f"run {self.name!r} has no checkpoint to go on from ({why})")


def _rounds(root: Path) -> list[Path]:
    """The folders of checkpoints, oldest first; by length too, for round 100000 is after 99999."""
    return sorted(root.glob("round-*"), key=lambda path: (len(path.name), path.name))


def _read_checkpoint(path: Path) -> Checkpoint:
    manifest = read_json(path / MANIFEST)
    sums = manifest["sha256"]
    if type(manifest["round"]) is not int or not isinstance(manifest["state"], dict):
        raise ValueError(f"{MANIFEST} is not one that fedsplit writes")
    for name in {MODULE_FILE, *sums}:
        if _sha256(path / name) != sums[name]:
            raise ValueError(f"{name} does not have the manifest's sha256")
    extra = _floats(path / EXTRA_FILE) if EXTRA_FILE in sums else {}
    return Checkpoint(manifest["round"], _floats(path / MODULE_FILE), manifest["state"], extra)


def _floats(path: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a file. Raises ValueError unless all are finite float32, as every module is."""
    tensors: dict[str, NDArray[np.float32]] = load_file(path)
    for name, value in tensors.items():
        if value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"{printable(name, limit=200)} in {path.name} is not finite float32")
    return tensors


def _check_shapes(module: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    got = {name: value.shape for name, value in module.items()}
    if odd := sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n)):
        raise ValueError(
            f"{printable(odd[0], limit=200)} is {got.get(odd[0], 'missing')}, {wanted.get(odd[0], 'nothing')} is "
            f"wanted: it is of another run"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(*files: Path) -> None:
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _translated(run: RunDir) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise RunDirError(
            f"run directory {run.path} cannot be written: {reason}; free some space on its disk and go on with "
            f"resume={run.name}, or start anew with runs-dir at another place"
        ) from err
