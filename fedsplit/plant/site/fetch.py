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
from fedsplit.core.errors import (
    BackboneError,
    FedsplitError,
    FolderError,
    PlantError,
    ServerRefusalError,
)
from fedsplit.core.foreign import MAX_JSON_BYTES, printable
from fedsplit.core.whole_files import write_whole
from fedsplit.model.backbone import Backbone
from fedsplit.model.manifest import Manifest, StoredTensor, read_manifest
from fedsplit.model.partial import is_stored
from fedsplit.model.store import BackboneStore, Fetch, WrongBytesError
from fedsplit.plant import paths
from fedsplit.plant.site import settings_text
from fedsplit.plant.site.calls import open_client
from fedsplit.plant.site.folder import SETTINGS, SiteFolder
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
    cut: Cut | None,
    *,
    sha256: str = "",
    progress: Progress = lambda _here, _all: None,
    say: Say = log.info,
    patience_s: float = PATIENCE_S,
) -> Path:
    """Bring what `cut` needs of the server's backbone into the store, and give the backbone's folder there.

    None: its small files. What is in the store and has lost bits comes again in any case.

    `sha256`: the digest that is wanted; else whichever the server has. Raises BackboneError: the server has another one,
    wrong bytes, no space; PlantError: the server does not give a tensor, or nothing new came for `patience_s`.
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

    def fetch(sha256: str, cut: Cut | None) -> Path:
        log.info("backbone %s is fetched for cut %s", sha256[:12], cut or "(not known yet)")
        with client() as opened:
            try:
                return fetch_backbone(
                    BackboneStore(folder), opened, cut, sha256=sha256, patience_s=_ORDER_PATIENCE_S
                )
            except PlantError as err:
                raise BackboneError(str(err)) from err

    return fetch


def of_site(folder: SiteFolder) -> Fetch:
    """The same for a site folder: from its server, with its certificate."""
    return fetcher(lambda: open_client(folder), folder.backbones)


def note_backbone(folder: SiteFolder, sha256: str) -> None:
    """Write into site.toml which backbone the site has, for what is loaded before a run. Raises FolderError."""
    if folder.settings.site.backbone_sha256 == sha256:
        return
    path = folder.path / SETTINGS
    text = settings_text.changed(path.read_text(encoding="utf-8"), {"backbone-sha256": sha256})
    try:
        write_whole(path, text)
    except OSError as err:
        raise FolderError(
            f"{path} cannot be written ({err}); free some space, then fetch again"
        ) from err


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

    def run(self, sha256: str, cut: Cut | None) -> Path:
        """All of it. Raises BackboneError and _ChangedError."""
        manifest = self._wanted(sha256)
        try:
            path = self._folder(manifest)
            self._tensors(manifest, cut)
        except (WrongBytesError, GoneError) as err:
            # Is it the line, or has the server another backbone by now? A wanted one cannot become another.
            if not sha256 and self._manifest().sha256 != manifest.sha256:
                raise _ChangedError from None
            kind: type[FedsplitError] = (
                BackboneError if isinstance(err, WrongBytesError) else ServerRefusalError
            )
            raise kind(str(err)) from err
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

    def _tensors(self, manifest: Manifest, cut: Cut | None) -> None:
        if damaged := self._store.drop_damaged(manifest):
            self._say(
                f"{len(damaged)} tensors have changed on this disk and come again; look after the disk"
            )
        needed = self._store.needed(manifest, cut) if cut else []
        wanted = {t.sha256: t for t in (*needed, *damaged)}
        lacking = [t for t in wanted.values() if not is_stored(self._store.folder, t)]
        self._check_space(lacking)
        in_all = sum(t.bytes for t in wanted.values())
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

    def _check_space(self, lacking: Iterable[StoredTensor]) -> None:
        wanted = sum(t.bytes - min(self._store.begun(t), t.bytes) for t in lacking)
        free = shutil.disk_usage(self._store.folder).free
        if wanted and wanted + _SPARE_BYTES > free:
            raise BackboneError(
                f"{wanted / 1e6:,.1f} MB more of the backbone are wanted, {printable(self._store.folder)} has "
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
