"""The module that a site uses: brought from the server by its digest, checked, and named in modules/current.json.

    SITE/modules/<digest>/                 a version's files, checked against the digest that the server promoted
    SITE/modules/<digest>.expected.json    what it answers on the site's own test samples (expected.py)
    SITE/modules/current.json              {"TASK": digest}: what is in use. Written last, as a whole

Each report's answer says what is in production (report.py). Whatever answers at the site reads current.json. A server that is
away, a line that breaks or a full disk leaves what is in use as it is. Without torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from fedsplit.core.closing import Closing
from fedsplit.core.errors import FedsplitError, FolderError, PlantError
from fedsplit.core.foreign import parse_json, printable, read_json
from fedsplit.core.whole_files import free_bytes, write_whole
from fedsplit.plant import paths
from fedsplit.plant.site.calls import open_client
from fedsplit.plant.site.clean import kept_modules, remove
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.ranges import Ranges
from fedsplit.plant.wire import MAX_BODY_BYTES, Answered, ModuleFile, ModuleFiles, ModuleState
from fedsplit.registry.module_files import digest_of, file_digests, is_file_name

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 300.0
_PATIENCE_S = 60.0
_SPARE_BYTES = 64 * 2**20
"""What a fetch leaves free on the disk."""
_LOWEST = 19
Say = Callable[[str], None]


def current(folder: SiteFolder) -> dict[str, str]:
    """Task -> digest of what is in use; empty before the first one, and where the file cannot be read."""
    try:
        found = read_json(folder.current_modules, limit=1 << 16)
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    return found if good else {}


class SiteModules(Closing):
    """Keeps the site's module the one that is in production. `hear` and `state` are the reports', `step` a thread's own."""

    def __init__(self, folder: SiteFolder, *, say: Say, idle: Callable[[], bool]) -> None:
        """`idle`: does nobody compute here now? Then a new module may be tried on the site's test samples."""
        self._folder, self._say, self._idle = folder, say, idle
        self._wanted: dict[str, str] | None = None
        self._lock = threading.Lock()
        self._fault = ""
        self._next = 0.0
        self._wait_s = _FIRST_WAIT_S
        self._trial: subprocess.Popen[bytes] | None = None
        self._tried: set[str] = set()

    def close(self) -> None:
        """End a trial that goes on."""
        if self._trial is not None and self._trial.poll() is None:
            self._trial.kill()
            self._trial.wait(timeout=5)
        self._trial = None

    def hear(self, modules: Mapping[str, str] | None) -> None:
        """What is in production, as the server says; None: it cannot say, and nothing changes."""
        if modules is None:
            return
        task = self._folder.settings.site.task
        wanted = {task: modules[task]} if task in modules else {}
        with self._lock:
            if wanted != self._wanted:
                self._wanted, self._next, self._wait_s = wanted, 0.0, _FIRST_WAIT_S

    def state(self) -> ModuleState | None:
        """What is in use and what is known of it; None where there is nothing to say."""
        digest = current(self._folder).get(self._folder.settings.site.task, "")
        if not digest and not self._fault:
            return None
        try:
            return ModuleState(digest=digest, expected=self._expected(digest), fault=self._fault)
        except ValidationError:
            return None  # somebody else wrote current.json

    def step(self) -> float:
        """Bring what is wanted, if it is time. Gives the seconds until the next look."""
        with self._lock:
            wanted, due = self._wanted, time.monotonic() >= self._next
        if wanted is None or wanted == current(self._folder):
            self._fault = ""
            self._try_out()
        elif due:
            self._bring(wanted)
        return _LOOK_S

    def _bring(self, wanted: dict[str, str]) -> None:
        try:
            for digest in wanted.values():
                self._fetch(digest)
            try:
                self._folder.modules.mkdir(mode=0o700, exist_ok=True)
                write_whole(self._folder.current_modules, json.dumps(wanted) + "\n")
            except OSError as err:
                raise _unwritable(self._folder.modules, err) from err
        except FedsplitError as err:
            self._next = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
            if str(err) != self._fault:
                self._say(f"the module in production is not in use here: {err}; it is tried again")
            self._fault = printable(err, limit=500)
            return
        self._fault, self._wait_s = "", _FIRST_WAIT_S
        for task, digest in wanted.items():
            self._say(f"module {digest[:12]} of task {printable(task)} is in use now")
        if not wanted:
            self._say("no module is in production any more, and none is in use here now")
        remove(self._folder, [one for one in kept_modules(self._folder) if one.goes])

    def _fetch(self, digest: str) -> None:
        """Have a version's folder, whole. Raises PlantError, FolderError."""
        final = self._folder.modules / digest
        try:
            if not _is_whole(final, digest):
                with open_client(self._folder) as client:
                    line = Ranges(client, say=self._say, patience_s=_PATIENCE_S, what="module")
                    self._fill(final, digest, line)
            # The newest ones are kept.
            os.utime(final)
        except OSError as err:
            raise _unwritable(final, err) from err

    def _fill(self, final: Path, digest: str, line: Ranges) -> None:
        listed = _listed(digest, line)
        part = final.with_name(f".{digest}.part")
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        for odd in {p.name for p in part.iterdir()} - {f.name for f in listed.files}:
            (part / odd).unlink()
        lacking = sum(file.bytes for file in listed.files) - sum(
            p.stat().st_size for p in part.iterdir()
        )
        free = free_bytes(part)
        if lacking + _SPARE_BYTES > free:
            raise FolderError(
                f"module {digest[:12]} wants {lacking / 1e6:,.1f} MB more, {printable(final.parent)} has {free / 1e6:,.1f} MB "
                f"free, and {_SPARE_BYTES >> 20} MB stay free; free some space"
            )
        for file in listed.files:
            _bring_file(part / file.name, file, f"{paths.MODULES}/{digest}/files/{file.name}", line)
        if final.exists():
            _clear(final)
        part.rename(final)
        log.info("module %s (%s#%d) is here", digest[:12], listed.task, listed.number)

    def _expected(self, digest: str) -> Answered | None:
        try:
            said = read_json(expected_file(self._folder, digest), limit=1 << 20)
            return Answered.model_validate(said["answered"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _try_out(self) -> None:
        """Have the module in use answer the site's test samples, once, when nothing else computes here."""
        if self._trial is not None:
            if self._trial.poll() is None:
                return
            self._trial = None
        digest = current(self._folder).get(self._folder.settings.site.task, "")
        there = digest and (self._folder.modules / digest).is_dir()
        if not there or digest in self._tried or expected_file(self._folder, digest).exists():
            return
        if not self._idle():
            return
        self._tried.add(digest)
        command = [sys.executable, "-m", "fedsplit.plant.site.expected", str(self._folder.path), digest]  # fmt: skip
        with (self._folder.logs / "expected.log").open("wb") as file:
            self._trial = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        # Training and answers come first.
        os.setpriority(os.PRIO_PROCESS, self._trial.pid, _LOWEST)


def expected_file(folder: SiteFolder, digest: str) -> Path:
    """Where what a module answers on the site's test samples stands. Not in its folder, whose files make the digest."""
    return folder.modules / f"{digest}.expected.json"


def _listed(digest: str, line: Ranges) -> ModuleFiles:
    """What a version consists of, which fits its digest. Raises PlantError."""
    text = line.whole(f"{paths.MODULES}/{digest}", MAX_BODY_BYTES)
    try:
        listed = ModuleFiles.model_validate(parse_json(text, limit=MAX_BODY_BYTES))
    except ValueError as err:
        raise PlantError(
            f"the server lists the files of module {digest[:12]} in a way that this fedsplit cannot read; is it of the same "
            f"version?"
        ) from err
    files = {file.name: file.sha256 for file in listed.files}
    if digest_of(files) != digest or len(files) != len(listed.files):
        raise PlantError(
            f"the server lists files for module {digest[:12]} that make {digest_of(files)[:12]}; on the server: fedsplit "
            f"module show {digest[:12]}"
        )
    if odd := [name for name in files if not is_file_name(name)]:
        raise PlantError(f"module {digest[:12]} has a file {odd[0]!r}, which no module has")
    return listed


def _bring_file(path: Path, file: ModuleFile, address: str, line: Ranges) -> None:
    """Raises PlantError where its bytes are wrong twice."""
    for left in (1, 0):
        path.touch(mode=0o600)
        line.fill(address, file.sha256, file.bytes, _InFile(path, file.bytes))
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if found == file.sha256:
            return
        path.unlink()
        if not left:
            raise PlantError(
                f"{file.name} came with other bytes than those of the module ({found[:12]}, {file.sha256[:12]} is wanted); "
                f"look after the line and the server's disk"
            )


class _InFile:
    """A file on its way."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size

    def have(self) -> int:
        return self._path.stat().st_size

    def write(self, start: int, chunks: Iterable[bytes]) -> None:
        with self._path.open("r+b") as handle:
            handle.truncate(start)
            handle.seek(start)
            for chunk in chunks:
                handle.write(chunk[: self._size - handle.tell()])


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return folder.is_dir() and digest_of(file_digests(folder)) == digest
    except FedsplitError:
        return False


def _clear(folder: Path) -> None:
    """What has lost bits goes."""
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _unwritable(path: Path, err: OSError) -> FolderError:
    return FolderError(
        f"{printable(err.filename or path)} cannot be written ({err.strerror or err}); free some space, or correct the rights"
    )
