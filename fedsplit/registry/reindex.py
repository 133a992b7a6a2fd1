"""modules.db made anew from the files beside it, after it was damaged or lost. What cannot be taken in is told and left alone."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsplit.core.errors import ConfigError, FedsplitError, RegistryError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.whole_files import write_whole
from fedsplit.registry.books import FORMAT, Books, versions_text
from fedsplit.registry.module_files import VERSION_FILE, module_digest
from fedsplit.registry.places import ALIASES, DATABASE, FILES
from fedsplit.registry.tables import database
from fedsplit.registry.version import MAX_NUMBER, Digest, Promotion, Record, ShortName

_MAX_VERSIONS = 1000


@dataclass(frozen=True)
class Reindexed:
    """What came of it."""

    versions: int
    aliases: int
    problems: tuple[str, ...]
    """What could not be taken in, a sentence each."""


class _Versions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1, le=1)]
    versions: Annotated[tuple[Record, ...], Field(max_length=_MAX_VERSIONS)]


class _Aliases(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=1, le=1)]
    aliases: dict[ShortName, dict[ShortName, Digest]] = {}
    numbers: dict[ShortName, Annotated[int, Field(ge=1, le=MAX_NUMBER)]] = {}
    promotions: tuple[Promotion, ...] = ()


def read_versions(path: Path) -> tuple[Record, ...]:
    """The versions of a version.json. Raises OSError and ValueError."""
    return _Versions.model_validate(read_json(path)).versions


def reindexed(folder: Path) -> Reindexed:
    """Make modules.db anew. The caller holds the registry. Raises RegistryError; then the old file stands."""
    problems: list[str] = []
    try:
        records = _records(folder / FILES, problems)
        said = _said(folder / ALIASES, problems)
        part = folder / f".{DATABASE}.{secrets.token_hex(4)}.part"
        try:
            aliases = _fill(part, records, said, problems)
            # The journal of the old one must not be played back into this one.
            for end in ("-journal", "-wal", "-shm"):
                (folder / f"{DATABASE}{end}").unlink(missing_ok=True)
            part.replace(folder / DATABASE)
            _keep_numbers(folder / FILES, records)
        finally:
            part.unlink(missing_ok=True)
            part.with_name(f"{part.name}-journal").unlink(missing_ok=True)
    except OSError as err:
        raise RegistryError(
            f"the registry {folder} cannot be made anew ({err.strerror or err}); free some space there, check who owns it, "
            f"and try again. No file of a module was changed"
        ) from err
    return Reindexed(len(records), aliases, tuple(problems))


def _records(files: Path, problems: list[str]) -> list[Record]:
    """All versions whose files are whole, each number of a task once."""
    found: list[Record] = []
    for folder in sorted(files.iterdir() if files.is_dir() else []):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            records = read_versions(folder / VERSION_FILE)
            digest = module_digest(folder)
        except (OSError, ValueError, FedsplitError) as err:
            problems.append(
                f"files/{printable(folder.name, limit=80)} is left out: {VERSION_FILE} or the files cannot be read "
                f"({printable(_short(err), limit=200)})"
            )
            continue
        if digest != folder.name or any(record.digest != digest for record in records):
            problems.append(
                f"files/{printable(folder.name, limit=80)} is left out: its files have the digest {digest[:12]}, they were "
                f"changed or belong elsewhere; restore the folder from the backup and reindex again"
            )
            continue
        found += records
    found.sort(key=lambda record: (record.task, record.number, record.created))
    return _numbered(found, problems)


def _numbered(records: list[Record], problems: list[str]) -> list[Record]:
    last: dict[str, int] = {}
    for record in records:
        last[record.task] = max(last.get(record.task, 0), record.number)
    taken: set[tuple[str, int]] = set()
    kept = []
    for record in records:
        if (record.task, record.number) in taken:
            last[record.task] += 1
            problems.append(
                f"two versions of task {record.task} have the number {record.number}; the later one is "
                f"{record.task}#{last[record.task]} now"
            )
            record = record.model_copy(update={"number": last[record.task]})
        taken.add((record.task, record.number))
        kept.append(record)
    return kept


def _keep_numbers(files: Path, records: list[Record]) -> None:
    """A version that got another number keeps it, whatever is added later."""
    for digest in {record.digest for record in records}:
        path = files / digest / VERSION_FILE
        now = [record for record in records if record.digest == digest]
        if {(r.task, r.number) for r in now} != {(r.task, r.number) for r in read_versions(path)}:
            write_whole(path, versions_text(now), mode=0o600)


def _said(path: Path, problems: list[str]) -> _Aliases:
    try:
        said = read_json(path)
        if isinstance(said, dict) and said.get("format") not in (None, FORMAT):
            raise ConfigError(
                f"{path} has format {printable(said['format'], limit=20)}, this fedsplit reads {FORMAT}; install the fedsplit "
                f"that made it"
            )
        return _Aliases.model_validate(said)
    except FileNotFoundError:
        problems.append(
            f"{ALIASES} is missing: no alias points anywhere; promote the versions that are in use"
        )
    except (OSError, ValueError) as err:
        problems.append(
            f"{ALIASES} cannot be read ({printable(_short(err), limit=200)}): no alias points anywhere; promote the versions "
            f"that are in use. The damaged file is kept as {path.name}.damaged"
        )
        path.replace(path.with_name(f"{path.name}.damaged"))
    return _Aliases(format=1)


def _fill(part: Path, records: list[Record], said: _Aliases, problems: list[str]) -> int:
    there = {(record.task, record.digest) for record in records}
    count = 0
    with database(part) as file, file.begin() as session:
        books = Books(session)
        for record in records:
            books.keep(record)
        for task, number in said.numbers.items():
            books.give_number(task, number)
        for task, aliases in said.aliases.items():
            for alias, digest in aliases.items():
                if (task, digest) in there:
                    books.point(task, alias, digest)
                    count += 1
                else:
                    problems.append(
                        f"{task}@{alias} pointed to {digest[:12]}, which is not here any more: the alias is gone"
                    )
        for promotion in said.promotions:
            books.moved(promotion)
    return count


def _short(err: Exception) -> str:
    if isinstance(err, ValidationError):
        first = err.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(err)
