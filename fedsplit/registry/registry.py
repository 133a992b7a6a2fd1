"""A registry of modules: a folder that keeps every version of every task's module, and which one is in use.

    modules.db          SQLite: what is asked and changed. Made anew from the rest by `reindex`
    files/<digest>/     a module's files, and version.json with what is known of them
    aliases.json        where the aliases point, how they came there, and the numbers given so far

A change is one transaction of the database. The files that go with it are written beforehand under another name and take
their place after it, so a full disk or a killed process leaves the old state or the new one. Processes take turns.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from pydantic import ValidationError

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.core.foreign import printable
from fedsplit.core.whole_files import hand_over
from fedsplit.registry.archive import pack, unpacked
from fedsplit.registry.books import Books, versions_text
from fedsplit.registry.module_files import VERSION_FILE, digest_of, file_digests, read_about
from fedsplit.registry.places import ALIASES, DATABASE, FILES, LOCK, find_registry, is_registry
from fedsplit.registry.prepared import Prepared
from fedsplit.registry.promotions import earlier, moved_meanwhile
from fedsplit.registry.reindex import Reindexed, reindexed
from fedsplit.registry.tables import database
from fedsplit.registry.version import (
    LATEST,
    MAX_RUNS,
    PRODUCTION,
    Facts,
    Promotion,
    Record,
    Run,
    Setting,
    Version,
    bare,
)

__all__ = ["ModuleRegistry", "find_registry", "is_registry"]

_LOCK_S = 120.0
Audit = Callable[[str, Mapping[str, Any]], None]
"""Told of each change, in a word and details, before it is in force; what it raises prevents the change."""


class ModuleRegistry(Closing):
    """The registry in a folder; safe in several threads and processes at once."""

    def __init__(self, folder: Path, *, audit: Audit | None = None) -> None:
        """Use `open`."""
        self.path = folder
        self._audit = audit or (lambda _what, _detail: None)
        self._db = database(folder / DATABASE)

    @classmethod
    def open(cls, folder: Path, *, create: bool = False, audit: Audit | None = None) -> Self:
        """The registry of a folder; with `create` a new one where none is.

        Raises ConfigError where there is none, RegistryError where it is damaged or cannot be used.
        """
        folder = folder.expanduser().absolute()
        try:
            if not is_registry(folder):
                if not create:
                    raise no_registry(folder)
                _make(folder)
            elif not _has_database(folder):
                raise RegistryError(
                    f"{folder / DATABASE} is missing, its modules are all there; `fedsplit module reindex --registry {folder}` "
                    f"makes it anew from the files"
                )
        except OSError as err:
            raise _unusable(folder, err) from err
        return cls(folder, audit=audit)

    def close(self) -> None:
        """Free the file."""
        self._db.close()

    def add(self, module_folder: Path, facts: Facts) -> Version:
        """Keep a module: a new version of its task, or one more run of the version that has the same files.

        Raises ConfigError where the folder is no module, RegistryError where it cannot be kept; then nothing has changed.
        """
        made = facts.created or time.time()
        run = (Run(name=facts.run, created=made),) if facts.run else ()
        facts = facts.model_copy(update={"created": made})
        return self._keep(module_folder, facts, runs=run, tags=(), what="module-added")

    def import_(self, file: Path) -> Version:
        """Keep what `export` wrote: as `add` does, with the runs and tags that the file names; no alias moves.

        Raises ConfigError for a file that is no such thing, RegistryError where it cannot be kept; then nothing has changed.
        """
        with unpacked(file, self.path) as (folder, record):
            if digest_of(file_digests(folder)) != record.digest:
                raise ConfigError(
                    f"{file} is damaged: its files have the digest {digest_of(file_digests(folder))[:12]}, {record.digest[:12]} "
                    f"is wanted; nothing was imported. Copy it again"
                )
            said = record.model_dump()
            facts = Facts.model_validate({name: said[name] for name in Facts.model_fields})
            return self._keep(
                folder, facts, runs=record.runs, tags=record.tags, what="module-imported"
            )

    def export(self, reference: str, file: Path) -> Version:
        """Write a version to a file that `import_` reads. Raises ConfigError and RegistryError; then there is no file."""
        version = self.get(reference)
        self.files(version)
        pack(self.folder(version), bare(version), file)
        return version

    @staticmethod
    def reindex(folder: Path) -> Reindexed:
        """Make the database anew from the files. Raises ConfigError where there is no registry, RegistryError."""
        folder = folder.expanduser().absolute()
        if not is_registry(folder):
            raise no_registry(folder)
        with locked(folder):
            return reindexed(folder)

    def _keep(
        self,
        module_folder: Path,
        facts: Facts,
        *,
        runs: tuple[Run, ...],
        tags: tuple[str, ...],
        what: str,
    ) -> Version:
        about = read_about(module_folder)
        files = file_digests(module_folder)
        digest = digest_of(files)
        with self._change() as (books, prepared):
            of_task = (v for v in books.of_digest(digest) if v.task == facts.task)
            old = next(of_task, None)
            number = old.number if old else books.next_number(facts.task)
            new = {"created": facts.created or time.time(), "number": number, "digest": digest}
            try:
                record = (
                    bare(
                        old,
                        runs=_joined(old.runs, runs),
                        tags=(*old.tags, *(set(tags) - {*old.tags})),
                    )
                    if old
                    else Record.model_validate(
                        facts.model_dump() | new | {"runs": runs, "tags": tags} | vars(about)
                    )
                )
            except ValidationError as err:
                raise ConfigError(
                    f"{module_folder} cannot be kept: {printable(_why(err), limit=400)}; give the module folder of a run"
                ) from err
            final = self.path / FILES / digest
            if not _whole(final, files):
                prepared.module(module_folder, final, files=files)
            books.keep(record)
            self._prepare_versions(books, prepared, digest)
            if old is None:
                detail = {"module": record.name, "module_sha256": digest, "run": facts.run}
                self._audit(what, detail)
            return books.get(record.name)

    def versions(self, task: str = "") -> list[Version]:
        """All versions, or a task's; by task, then by number."""
        with self._db.begin("read") as session:
            return Books(session).versions(task)

    def get(self, reference: str) -> Version:
        """The version of TASK (its production), TASK@ALIAS, TASK@latest, TASK#3 or a digest. Raises ConfigError."""
        with self._db.begin("read") as session:
            return Books(session).get(reference)

    def of_digest(self, digest: str) -> list[Version]:
        """The versions of these very files, one a task; empty where there is none. The whole digest is wanted."""
        with self._db.begin("read") as session:
            return Books(session).of_digest(digest)

    def folder(self, version: Version) -> Path:
        """Where the version's files lie; nobody may change them."""
        return self.path / FILES / version.digest

    def files(self, version: Version) -> dict[str, str]:
        """File name -> SHA-256 of the module's own files, which may travel; version.json is none of them.

        Raises RegistryError where they are not as they were kept.
        """
        folder = self.folder(version)
        if not folder.is_dir():
            raise RegistryError(
                f"{folder} is missing, so {version.name} cannot be used; restore it from the backup, or "
                f"`fedsplit module remove {version.name}`"
            )
        files = file_digests(folder)
        if digest_of(files) != version.digest:
            raise RegistryError(
                f"the files of {version.name} in {folder} were changed: their digest is {digest_of(files)[:12]}, "
                f"{version.digest[:12]} is wanted; restore the folder from the backup"
            )
        return files

    def promote(
        self,
        reference: str,
        *,
        alias: str = PRODUCTION,
        by: str,
        why: str = "",
        expected: str | None = None,
        measured: Mapping[str, Setting] = {},
    ) -> Promotion:
        """Have an alias point to a version, which is whole.

        `expected`: the digest that the alias must still point to ("": to none); None: to any. `measured`: what was decided by.
        Raises ConfigError for an unknown version or a bad name, RegistryError where the alias points elsewhere by now.
        """
        if alias == LATEST:
            raise ConfigError(
                f"{LATEST} is always the highest number, no alias; use another word, e.g. candidate"
            )
        with self._change() as (books, _):
            version = books.get(reference)
            self.files(version)
            now = books.aliases().get(version.task, {}).get(alias, "")
            if expected is not None and now != expected:
                raise RegistryError(moved_meanwhile(books, version.task, alias, now, expected))
            promotion = _promotion(
                task=version.task, alias=alias, digest=version.digest, previous=now, by=by, why=why,
                measured=dict(measured), kind="promote",
            )  # fmt: skip
            self._move(books, promotion, version)
        return promotion

    def rollback(self, task: str, *, alias: str = PRODUCTION, by: str, why: str = "") -> Promotion:
        """Have an alias point to where it pointed before its last promotion; again: one further back.

        Raises ConfigError where there is nothing to go back to.
        """
        with self._change() as (books, _):
            now = books.aliases().get(task, {}).get(alias, "")
            back = earlier(books.history(task), alias, {v.digest for v in books.versions(task)})
            if not now or not back:
                raise ConfigError(
                    f"{alias} of task {printable(task, limit=100)} "
                    + ("points to no version" if not now else "was never promoted before")
                    + ", so there is nothing to go back to; `fedsplit module list` shows the versions, "
                    "`fedsplit module promote` names one"
                )
            version = next(v for v in books.of_digest(back) if v.task == task)
            self.files(version)
            promotion = _promotion(
                task=task, alias=alias, digest=back, previous=now, by=by, why=why, kind="rollback"
            )
            self._move(books, promotion, version)
        return promotion

    def aliases(self) -> dict[str, dict[str, str]]:
        """Task -> alias -> digest."""
        with self._db.begin("read") as session:
            return Books(session).aliases()

    def history(self, task: str = "") -> list[Promotion]:
        """All moves of a task's aliases, oldest first."""
        with self._db.begin("read") as session:
            return Books(session).history(task)

    def tag(self, reference: str, tag: str, *, off: bool = False) -> Version:
        """Mark a version with a word, or take the word `off` again. Raises ConfigError."""
        with self._change() as (books, prepared):
            version = books.get(reference)
            kept = [t for t in version.tags if t != tag]
            try:
                record = bare(version, tags=tuple(kept if off else [*kept, tag]))
            except ValidationError as err:
                raise ConfigError(
                    f"tag {printable(tag, limit=100)!r}: {printable(_why(err))}"
                ) from err
            books.keep(record)
            self._prepare_versions(books, prepared, version.digest)
            self._audit("module-tagged", {"module": version.name, "tag": tag, "off": off})
            return books.get(version.name)

    def remove(self, reference: str, *, force: bool = False) -> Version:
        """Forget a version and its files; its number is not given again.

        Raises ConfigError for one that an alias points to or would go back to; with `force` that goes too.
        """
        with self._change() as (books, prepared):
            version = books.get(reference)
            if not force:
                self._check_free(books, version)
            books.drop(version)
            others = books.of_digest(version.digest)
            if others:
                self._prepare_versions(books, prepared, version.digest)
            self._audit("module-removed", {"module": version.name, "module_sha256": version.digest})
        if not others:
            shutil.rmtree(self.folder(version), ignore_errors=True)
        return version

    def _check_free(self, books: Books, version: Version) -> None:
        if version.aliases:
            raise ConfigError(
                f"{version.shown} is in use; promote another version first, or remove it and its alias with --force"
            )
        there = {v.digest for v in books.versions(version.task)}
        history = books.history(version.task)
        for alias in books.aliases().get(version.task, {}):
            if earlier(history, alias, there) == version.digest:
                raise ConfigError(
                    f"a rollback of {version.task}@{alias} would go back to {version.name}; with --force it is removed all the "
                    f"same"
                )

    def _move(self, books: Books, promotion: Promotion, version: Version) -> None:
        books.point(promotion.task, promotion.alias, promotion.digest)
        books.moved(promotion)
        detail = {"module": version.name, "module_sha256": version.digest, "alias": promotion.alias}
        detail |= {"previous": promotion.previous, "by": promotion.by, "why": promotion.why}
        measured = [f"{name}: {value}" for name, value in promotion.measured.items()]
        what = "module-promoted" if promotion.kind == "promote" else "module-rolled-back"
        self._audit(what, detail | {"measured": measured})

    def _prepare_versions(self, books: Books, prepared: Prepared, digest: str) -> None:
        """The version.json of some files, as it is after the change."""
        records = [bare(version) for version in books.of_digest(digest)]
        prepared.text(self.path / FILES / digest / VERSION_FILE, versions_text(records))

    @contextmanager
    def _change(self) -> Iterator[tuple[Books, Prepared]]:
        """One change: all of it or nothing. Raises RegistryError."""
        prepared = Prepared()
        with locked(self.path):
            try:
                with self._db.begin() as session:
                    books = Books(session)
                    yield books, prepared
                    prepared.text(self.path / ALIASES, books.aliases_text())
            except BaseException:
                prepared.undo()
                raise
            try:
                prepared.settle()
            except OSError as err:
                raise _unusable(self.path, err) from err


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else changes the registry meanwhile. Raises RegistryError where somebody does for long."""
    lock = FileLock(folder / LOCK, timeout=_LOCK_S, mode=0o600)
    try:
        lock.acquire()
    except Timeout as err:
        raise RegistryError(
            f"another command has been changing the registry {folder} for {_LOCK_S:.0f} s; wait for its end and try again"
        ) from err
    except OSError as err:
        raise _unusable(folder, err) from err
    try:
        hand_over(folder / LOCK)
        yield
    finally:
        lock.release()


def no_registry(folder: Path) -> ConfigError:
    """The error where there is none."""
    return ConfigError(
        f"there is no registry of modules in {folder}; a run makes one beside the runs (runs/modules), a federation has it in "
        f"DIR/modules. Give its folder with --registry"
    )


def _promotion(**values: Any) -> Promotion:
    try:
        return Promotion(at=time.time(), **values)
    except ValidationError as err:
        raise ConfigError(f"this cannot be promoted: {printable(_why(err))}") from err


def _why(err: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
        for e in err.errors()[:3]
    )


def _joined(runs: tuple[Run, ...], more: tuple[Run, ...]) -> tuple[Run, ...]:
    known = {run.name for run in runs}
    return (*runs, *(run for run in more if run.name not in known))[:MAX_RUNS]


def _whole(folder: Path, files: dict[str, str]) -> bool:
    return folder.is_dir() and file_digests(folder) == files


def _has_database(folder: Path) -> bool:
    """An empty file is what a power cut leaves; SQLite would take it for a new one."""
    database = folder / DATABASE
    kept = (folder / FILES).is_dir() and any((folder / FILES).iterdir())
    return database.is_file() and (database.stat().st_size > 0 or not kept)


def _make(folder: Path) -> None:
    # What is inside was learnt of people's data.
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        folder.chmod(0o700)
        hand_over(folder)
    if not (folder / FILES).is_dir():
        (folder / FILES).mkdir(mode=0o700)
        hand_over(folder / FILES)


def _unusable(folder: Path, err: OSError) -> RegistryError:
    return RegistryError(
        f"the registry {folder} cannot be used ({err.strerror or err}); free some space there, and check who owns it"
    )
