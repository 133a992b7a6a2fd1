"""A store of backbones in parts: each tensor once, whichever backbones, cuts and tasks share it.

    STORE/tensors/SHA256     one tensor's bytes (partial.py)
    STORE/BACKBONE/          a partial folder, named by the backbone's digest: `Backbone.find` takes it

Nothing enters under its name before its size and sha256 are right and it is on the disk. Several processes may share
a store. Who fetches is not this file's business: `ready` calls who it was given.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone, frozen_names, frozen_paths
from fedsplit.model.checkpoint import stored_under
from fedsplit.model.files import MANIFEST, Stamp, stamp
from fedsplit.model.manifest import (
    Manifest,
    StoredFile,
    StoredTensor,
    digest_of,
    read_manifest,
    stored_files,
)
from fedsplit.model.partial import TENSORS, is_stored, places, tensor_file

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = ".part"

Fetch = Callable[[str, Cut | None], Path]
"""(backbone's digest, cut) -> its folder in the store, with all that the cut needs; None: small files. Raises BackboneError."""


class WrongBytesError(BackboneError):
    """What came is not what the manifest says."""


class BackboneStore:
    """A folder of backbones in parts."""

    def __init__(self, folder: Path, *, fetch: Fetch | None = None) -> None:
        """Nothing is made or read yet. `fetch` is asked for what is not here."""
        self.folder = folder.expanduser().resolve()
        self._fetch = fetch
        self._lock = FileLock(self.folder / ".lock")

    def find(self, sha256: str) -> Path | None:
        """The folder of the backbone with this digest, or None. Not all of its tensors need be here."""
        path = self.folder / sha256
        if not _SHA256.fullmatch(sha256) or not (path / MANIFEST).is_file():
            return None
        with contextlib.suppress(BackboneError):  # what is damaged is not here
            return path if read_manifest(path).sha256 == sha256 else None
        return None

    def has_files(self, manifest: Manifest) -> bool:
        """Is the backbone's folder here, and its small files are those of the manifest?"""
        path = self.find(manifest.sha256)
        return path is not None and stored_files(path) == manifest.files

    def ready(self, sha256: str, cut: Cut | None) -> Path:
        """The folder of this backbone with all that the cut needs, fetched where it is not here; None: its small files.

        Raises BackboneError where nobody fetches, or who does cannot.
        """
        path = self.find(sha256)
        lacking = self.missing(read_manifest(path), cut) if path and cut else []
        if path and not lacking:
            return path
        if self._fetch is not None:
            return self._fetch(sha256, cut)
        what = places(t.name for t in lacking) if path else "it is not here at all"
        raise BackboneError(
            f"{self.folder} has not what cut {cut or '(not known yet)'} needs of backbone {sha256[:12]}: {what}; run fedsplit "
            f"site fetch"
        )

    def needed(self, manifest: Manifest, cut: Cut) -> list[StoredTensor]:
        """The tensors that a device with this cut reads. The backbone's folder must be here. Raises BackboneError."""
        path = self.folder / manifest.sha256
        keys = _needed(path, stamp(path), cut)
        return [tensor for tensor in manifest.tensors if tensor.name in keys]

    def missing(self, manifest: Manifest, cut: Cut) -> list[StoredTensor]:
        """Those of `needed` that are not here, each digest once."""
        lacking = (t for t in self.needed(manifest, cut) if not is_stored(self.folder, t))
        return list({tensor.sha256: tensor for tensor in lacking}.values())

    def drop_damaged(self, manifest: Manifest) -> list[StoredTensor]:
        """Remove what is here of a backbone with other bytes than came, and name it. Reads all that is here."""
        damaged: dict[str, StoredTensor] = {}
        for tensor in manifest.tensors:
            file = tensor_file(self.folder, tensor.sha256)
            if file.is_file() and digest_of(file, 0, file.stat().st_size) != tensor.sha256:
                file.unlink(missing_ok=True)
                damaged[tensor.sha256] = tensor
        return list(damaged.values())

    def add_backbone(self, manifest: Manifest, files: dict[str, bytes]) -> Path:
        """Make the folder of a backbone of its small files, all at once. Raises BackboneError."""
        if files.keys() != {file.name for file in manifest.files}:
            raise BackboneError(
                f"backbone {manifest.sha256[:12]}: other files came than those of its {MANIFEST}"
            )
        for file in manifest.files:
            _compare(file, len(files[file.name]), hashlib.sha256(files[file.name]).hexdigest())
        target, new = self.folder / manifest.sha256, self.folder / f"{uuid.uuid4().hex}{_PART}"
        with self._writing(), self.lock():
            if self.has_files(manifest):
                return target
            try:
                new.mkdir(parents=True)
                for name, data in (*files.items(), (MANIFEST, manifest.canonical())):
                    _write(new / name, [data])
                if target.exists():  # and is damaged
                    target.rename(old := self.folder / f"{uuid.uuid4().hex}{_PART}")
                    shutil.rmtree(old, ignore_errors=True)
                return new.rename(target)
            finally:
                shutil.rmtree(new, ignore_errors=True)

    def add_tensor(self, tensor: StoredTensor, chunks: Iterable[bytes]) -> Path:
        """Store a tensor's bytes. Raises BackboneError for wrong ones, of which nothing stays, and for a full disk."""
        part = self.folder / TENSORS / f"{uuid.uuid4().hex}{_PART}"
        try:
            self._append(part, 0, _capped(chunks, tensor.bytes, spare=1))
            return self._accept(tensor, part)
        finally:
            part.unlink(missing_ok=True)

    def begun(self, tensor: StoredTensor) -> int:
        """Bytes of a tensor that came, from its beginning, and wait for the rest."""
        try:
            return self._part(tensor).stat().st_size
        except OSError:
            return 0

    def append(self, tensor: StoredTensor, start: int, chunks: Iterable[bytes]) -> None:
        """Write what came from byte `start` on. For who holds `lock`. Raises BackboneError for a full disk.

        What `chunks` raises leaves what was written.
        """
        self._append(self._part(tensor), start, _capped(chunks, tensor.bytes - start, spare=0))

    def complete(self, tensor: StoredTensor) -> Path:
        """Name what came of a tensor, all of it. Raises WrongBytesError, and removes it, where it is other bytes."""
        part = self._part(tensor)
        if not tensor.bytes:
            return self.add_tensor(tensor, [])
        try:
            return self._accept(tensor, part)
        finally:
            part.unlink(missing_ok=True)

    def _part(self, tensor: StoredTensor) -> Path:
        return tensor_file(self.folder, tensor.sha256).with_suffix(_PART)

    def _append(self, part: Path, start: int, chunks: Iterable[bytes]) -> None:
        with self._writing():
            part.parent.mkdir(parents=True, exist_ok=True)
            _write(part, chunks, start=start)

    def _accept(self, tensor: StoredTensor, part: Path) -> Path:
        with self._writing():
            size = part.stat().st_size
            _compare(tensor, size, digest_of(part, 0, size))
            return part.replace(tensor_file(self.folder, tensor.sha256))

    def lock(self) -> FileLock:
        """Held by who fetches into the store, or takes out of it: one process at a time. Readers need none."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._lock

    def backbones(self) -> list[Path]:
        """The folders of all backbones here."""
        return sorted(
            p.parent for p in self.folder.glob(f"*/{MANIFEST}") if _SHA256.fullmatch(p.parent.name)
        )

    def total_bytes(self) -> int:
        """Bytes of all files in the store."""
        total = 0
        for file in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += file.stat().st_size if file.is_file() else 0
        return total

    def prune(self, keep: Collection[str]) -> int:
        """Remove all backbones but those with these digests, tensors that none of them has, and what was begun; bytes freed."""
        before = self.total_bytes()
        with self.lock(), self._writing():
            for path in self.backbones():
                if path.name not in keep:
                    shutil.rmtree(path)
            kept = {t.sha256 for path in self.backbones() for t in read_manifest(path).tensors}
            for file in (self.folder / TENSORS).glob("*"):
                if file.name not in kept:
                    file.unlink()
            for half in self.folder.glob(f"*{_PART}"):
                shutil.rmtree(half)
        return before - self.total_bytes()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise BackboneError(
                f"the backbones in {self.folder} cannot be changed ({err}); free some space there or correct the rights; "
                f"what is there stays whole"
            ) from err


@lru_cache(maxsize=16)
def _needed(path: Path, state: Stamp, cut: Cut) -> frozenset[str]:
    """Stored names of what a cut needs. A skeleton takes 100 ms and more, and a site asks in every round."""
    del state
    backbone = Backbone.find(str(path))
    cut.check(backbone.blocks)
    skeleton = backbone.skeleton(1)
    blocks = cut.device_blocks(backbone.blocks)
    paths = frozen_paths(backbone.family, blocks, pool=not cut.pooled(backbone.blocks))
    names = (tensor.name for tensor in read_manifest(path).tensors)
    return frozenset(stored_under(names, skeleton, frozen_names(skeleton, paths)))


def _compare(part: StoredTensor | StoredFile, size: int, sha256: str) -> None:
    if (size, sha256) != (part.bytes, part.sha256):
        raise WrongBytesError(
            f"what came as {part.name} has {size} bytes and sha256 {sha256[:12]}, the manifest says {part.bytes} bytes and "
            f"{part.sha256[:12]}; something on the way changes it, or the server's files have changed"
        )


def _capped(chunks: Iterable[bytes], left: int, *, spare: int) -> Iterator[bytes]:
    """At most `left` bytes, and `spare` more: one too many is enough to tell."""
    left += spare
    for chunk in chunks:
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return


def _write(path: Path, chunks: Iterable[bytes], *, start: int = 0) -> None:
    with path.open("r+b" if start else "wb") as file:
        file.truncate(start)
        file.seek(start)
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
