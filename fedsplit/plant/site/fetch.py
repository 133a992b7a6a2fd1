"""Fetches the parts of a backbone that a site's cut needs from the control service.

Small files and tensors go into the site's store (model/store.py), each compared with the manifest. `fetch_backbone` is for
joining and `site fetch`; `fetcher` is what the resident runtime gives its store, for a run with another cut.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import httpx
from filelock import Timeout

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import MAX_JSON_BYTES, printable
from fedsplit.model.backbone import Backbone
from fedsplit.model.manifest import Manifest, StoredTensor, read_manifest
from fedsplit.model.store import BackboneStore, Fetch, WrongBytesError
from fedsplit.plant import paths
from fedsplit.plant.site.ranges import PATIENCE_S, GoneError, Ranges, Say

log = logging.getLogger(__name__)

_SPARE_BYTES = 64 * 2**20
"""What a fetch leaves free on the disk."""
_MOST_CHANGES = 3
_MOST_WRONG = 2
# An order waits for a fetch, and the run for the order.
_ORDER_PATIENCE_S = 60.0

Progress = Callable[[int, int], None]
"""(bytes here, bytes in all) of what the cut needs."""


def fetch_backbone(
    store: BackboneStore,
    client: httpx.Client,
    cut: Cut,
    *,
    sha256: str = "",
    progress: Progress = lambda _here, _all: None,
    say: Say = log.info,
    patience_s: float = PATIENCE_S,
) -> Path:
    """Bring what `cut` needs of the server's backbone into the store, and give the backbone's folder there.

    `sha256`: the digest that is wanted; else whichever the server has. Raises BackboneError: the server has another one or
    does not give a tensor, wrong bytes, no space, nothing new came for `patience_s`.
    """
    line = Ranges(client, say=say, patience_s=patience_s)
    with _alone(store, say):
        for _ in range(_MOST_CHANGES):
            with contextlib.suppress(_ChangedError):
                return _Fetch(store, line, progress, say).run(sha256, cut)
            say(
                "the server's backbone changed while it was fetched; starting again with the new one"
            )
    raise BackboneError(
        f"the server's backbone changed {_MOST_CHANGES} times while it was fetched; wait until it stays as it is, and fetch "
        f"again"
    )


def fetcher(client: Callable[[], httpx.Client], folder: Path) -> Fetch:
    """What a store asks for tensors that it lacks: `BackboneStore(folder, fetch=fetcher(client, folder))`."""

    def fetch(sha256: str, cut: Cut) -> Path:
        log.info("backbone %s is fetched for cut %s", sha256[:12], cut)
        with client() as opened:
            return fetch_backbone(
                BackboneStore(folder), opened, cut, sha256=sha256, patience_s=_ORDER_PATIENCE_S
            )

    return fetch


@contextlib.contextmanager
def _alone(store: BackboneStore, say: Say) -> Iterator[None]:
    lock = store.lock()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process fetches into the same store; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _ChangedError(Exception):
    """The server has other files than those that its manifest named."""


class _Fetch:
    """One try, by one manifest."""

    def __init__(self, store: BackboneStore, line: Ranges, progress: Progress, say: Say) -> None:
        self._store, self._line, self._progress, self._say = store, line, progress, say

    def run(self, sha256: str, cut: Cut) -> Path:
        """All of it. Raises BackboneError and _ChangedError."""
        manifest = self._wanted(sha256)
        try:
            path = self._folder(manifest)
            self._tensors(manifest, cut)
        except (WrongBytesError, GoneError):
            # Is it the line, or has the server another backbone by now? A wanted one cannot become another.
            if not sha256 and self._manifest().sha256 != manifest.sha256:
                raise _ChangedError from None
            raise
        return path

    def _wanted(self, sha256: str) -> Manifest:
        path = self._store.find(sha256)
        if path is not None and self._store.has_files(own := read_manifest(path)):
            return own
        manifest = self._manifest()
        if sha256 and manifest.sha256 != sha256:
            raise BackboneError(
                f"backbone {sha256[:12]} is wanted, the server has {manifest.sha256[:12]}: its files were changed, or the run "
                f"names a backbone of its own; start the run again, or copy that backbone's folder to this machine"
            )
        return manifest

    def _manifest(self) -> Manifest:
        return Manifest.parse(self._line.whole(paths.MANIFEST, MAX_JSON_BYTES))

    def _folder(self, manifest: Manifest) -> Path:
        """The backbone's folder in the store, with its small files."""
        path = self._store.folder / manifest.sha256
        if not self._store.has_files(manifest):
            came = {file.name: _InMemory(file.bytes) for file in manifest.files}
            for file in manifest.files:
                self._line.fill(
                    f"{paths.FILES}/{file.name}", file.sha256, file.bytes, came[file.name]
                )
            path = self._store.add_backbone(manifest, {n: bytes(c.data) for n, c in came.items()})
        own = Backbone.find(str(path))
        if own.sha256 != manifest.sha256:
            raise BackboneError(
                f"this machine makes other inputs of the backbone's files than the server ({own.differs(manifest.sha256)}): "
                f"install the server's versions of transformers and tokenizers here"
            )
        return path

    def _tensors(self, manifest: Manifest, cut: Cut) -> None:
        if damaged := self._store.drop_damaged(manifest, cut):
            self._say(
                f"{damaged} tensors have changed on this disk and come again; look after the disk"
            )
        needed = {t.sha256: t for t in self._store.needed(manifest, cut)}
        lacking = self._store.missing(manifest, cut)
        self._check_space(lacking, cut)
        in_all = sum(t.bytes for t in needed.values())
        here = in_all - sum(t.bytes for t in lacking)
        self._progress(here, in_all)
        for tensor in lacking:
            self._tensor(tensor, lambda more, here=here: self._progress(here + more, in_all))  # type: ignore[misc]
            here += tensor.bytes

    def _tensor(self, tensor: StoredTensor, progress: Callable[[int], None]) -> None:
        """Raises BackboneError; WrongBytesError only where they were wrong more than once."""
        sink = _InStore(self._store, tensor, progress)
        for left in reversed(range(_MOST_WRONG)):
            self._line.fill(f"{paths.TENSORS}/{tensor.sha256}", tensor.sha256, tensor.bytes, sink)
            try:
                self._store.complete(tensor)
            except WrongBytesError:
                if not left:
                    raise
            else:
                progress(tensor.bytes)
                return

    def _check_space(self, lacking: Iterable[StoredTensor], cut: Cut) -> None:
        wanted = sum(t.bytes - min(self._store.begun(t), t.bytes) for t in lacking)
        free = shutil.disk_usage(self._store.folder).free
        if wanted and wanted + _SPARE_BYTES > free:
            raise BackboneError(
                f"cut {cut} needs {wanted / 1e6:,.1f} MB more of the backbone, {printable(self._store.folder)} has "
                f"{free / 1e6:,.1f} MB free, and {_SPARE_BYTES >> 20} MB stay free; free some space, or choose a cut with fewer "
                f"blocks on this machine"
            )


class _InMemory:
    """A small file on its way."""

    def __init__(self, size: int) -> None:
        self.data, self._size = bytearray(), size

    def have(self) -> int:
        return len(self.data)

    def write(self, start: int, chunks: Iterable[bytes]) -> None:
        del self.data[start:]
        for chunk in chunks:
            self.data += chunk[: self._size - len(self.data)]


class _InStore:
    """A tensor on its way."""

    def __init__(
        self, store: BackboneStore, tensor: StoredTensor, progress: Callable[[int], None]
    ) -> None:
        self._store, self._tensor, self._progress = store, tensor, progress

    def have(self) -> int:
        return self._store.begun(self._tensor)

    def write(self, start: int, chunks: Iterable[bytes]) -> None:
        self._store.append(self._tensor, start, self._counted(start, chunks))

    def _counted(self, here: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            here = min(here + len(chunk), self._tensor.bytes)
            yield chunk
            self._progress(here)
