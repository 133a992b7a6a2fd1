"""What a real site keeps about its samples, on its own disk: the side that each one got, and each run's list.

Sides go by digest and stay for good, whatever comes, goes or is called otherwise: what has taught
never tests. The list of a run is made at roll call, and each later message of that run, which is a
process of its own, reads what is on it. Files are NumPy's own, written whole, without objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fedsplit.core.errors import RunDirError
from fedsplit.training.data.examples import Digests
from fedsplit.training.data.split import TEST, TRAIN, UNKNOWN, Sides

log = logging.getLogger(__name__)

LISTS_KEPT = 8
"""Of one source; runs beyond that many are over, or start anew."""
LOCK_S = 120.0
"""Dealing takes as long as reading all files does."""

_ERRORS = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Listed:
    """The samples of a run, in the order that its seeds deal them in."""

    digests: Digests
    sides: Sides
    labels: NDArray[np.int64]
    """[N], positions in `classes`."""
    classes: tuple[str, ...]
    origins: tuple[str, ...]
    """[N], or empty where samples are not files of their own."""
    stamps: NDArray[np.int64]
    """[N, 2], size and time of change of each file: where both are as they were it is not read for its digest."""
    pixel_max: float = 0.0
    """The value that was found to be white; 0 for texts."""


@dataclass(frozen=True)
class Record:
    """The files of one site, as one run uses them."""

    folder: Path
    site: str
    run: str

    def sides(self, digests: Digests) -> Sides:
        """The side of each sample, UNKNOWN where it has none yet."""
        found = np.full(len(digests), UNKNOWN, np.int8)
        kept = self._read(self._sides, ("digests", "sides"))
        if kept is None or not len(kept["digests"]):
            return found
        # Sorted when they were written.
        at = np.searchsorted(kept["digests"], digests).clip(max=len(kept["digests"]) - 1)
        same = kept["digests"][at] == digests
        found[same] = kept["sides"][at[same]]
        return found

    def add(self, digests: Digests, sides: Sides) -> None:
        """Keep these sides beside those that are kept, which stay as they are. Raises RunDirError."""
        kept = self._read(self._sides, ("digests", "sides"))
        if kept is not None:
            digests = np.concatenate([kept["digests"], digests])
            sides = np.concatenate([kept["sides"], sides])
        unique, first = np.unique(digests, return_index=True)
        self._write(self._sides, {"digests": unique, "sides": sides[first]})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this site deals sides meanwhile: a site may be in two runs. Raises RunDirError."""
        lock = FileLock(self._folder / f"{_key(self.site)}.lock", timeout=LOCK_S, mode=0o600)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
        except (OSError, Timeout) as err:
            raise self._cannot(err) from err
        try:
            yield
        finally:
            lock.release()

    @property
    def damaged(self) -> bool:
        """Are there sides that cannot be read?"""
        known = self._read(self._sides, ("digests", "sides"))
        return known is None and self._sides.exists()

    def listed(self, source: str) -> Listed | None:
        """This run's list of the samples of a source, or None where it has none."""
        return self._list(self._list_file(source, self.run))

    def last(self, source: str) -> Listed | None:
        """The list of the run before."""
        lists = self._lists(source)
        return self._list(lists[-1]) if lists else None

    def keep(self, source: str, listed: Listed) -> None:
        """Make this the run's list, and forget those of runs long over. Raises RunDirError."""
        arrays: dict[str, NDArray[Any]] = {
            "digests": listed.digests,
            "sides": listed.sides,
            "labels": listed.labels,
            "classes": _packed(listed.classes),
            "origins": _packed(listed.origins),
            "stamps": listed.stamps,
            "pixel_max": np.array(listed.pixel_max),
        }
        self._write(self._list_file(source, self.run), arrays)
        for old in self._lists(source)[:-LISTS_KEPT]:
            old.unlink(missing_ok=True)

    @property
    def _sides(self) -> Path:
        return self._folder / f"{_key(self.site)}.sides.npz"

    @property
    def _folder(self) -> Path:
        return self.folder.expanduser()

    def _list_file(self, source: str, run: str) -> Path:
        return self._folder / f"{_key(self.site, source)}-{_key(run)}.list.npz"

    def _lists(self, source: str) -> list[Path]:
        """All lists of a source, the newest last."""
        try:
            found = list(self._folder.glob(f"{_key(self.site, source)}-*.list.npz"))
            return sorted(found, key=lambda path: path.stat().st_mtime_ns)
        except OSError:
            return []

    def _list(self, path: Path) -> Listed | None:
        names = ("digests", "sides", "labels", "classes", "origins", "stamps", "pixel_max")
        kept = self._read(path, names)
        if kept is None:
            return None
        try:
            classes, origins = _unpacked(kept["classes"]), _unpacked(kept["origins"])
        except UnicodeDecodeError as err:
            log.warning("%s cannot be used and is left aside: %s", path, err)
            return None
        return Listed(
            digests=kept["digests"],
            sides=kept["sides"],
            labels=kept["labels"],
            classes=classes,
            origins=origins,
            stamps=kept["stamps"],
            pixel_max=float(kept["pixel_max"]),
        )

    def _read(self, path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
        """The arrays of a file; None where it is not there or cannot be used, which the log tells."""
        if not path.is_file():
            return None
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in names}
            if arrays["digests"].dtype != np.uint64 or not set(
                np.unique(arrays["sides"]).tolist()
            ) <= {TRAIN, TEST}:
                raise ValueError("these are not sides of samples")
            if arrays["digests"].shape != arrays["sides"].shape:
                raise ValueError("it has more digests than sides, or fewer")
            if any(array.dtype.kind not in "iuf" for array in arrays.values()):
                raise ValueError("another version of fedsplit wrote it")
        except _ERRORS as err:
            log.warning("%s cannot be used and is left aside: %s", path, err)
            return None
        return arrays

    def _write(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            # What it says of the samples is nobody else's business.
            with os.fdopen(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            part.replace(path)
        except OSError as err:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise self._cannot(err) from err

    def _cannot(self, err: Exception) -> RunDirError:
        return RunDirError(
            f"site {self.site!r} cannot keep in {self._folder} which samples test: {err}; free some space, or set "
            f"state-dir in its node config to another folder"
        )


def _packed(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Texts as bytes: an array of texts would give each of them the room of the longest path."""
    return np.frombuffer("\0".join(texts).encode(errors="surrogatepass"), np.uint8)


def _unpacked(packed: NDArray[np.uint8]) -> tuple[str, ...]:
    return tuple(packed.tobytes().decode(errors="surrogatepass").split("\0")) if packed.size else ()


def _key(*parts: str) -> str:
    # Names of sites and paths hold what file names may not.
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).hexdigest()[:24]
