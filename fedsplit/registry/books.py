"""The rows of a registry within one transaction: versions, aliases, promotions, numbers; and the text of aliases.json."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.registry.reference import Reference
from fedsplit.registry.tables import AliasRow, NumberRow, PromotionRow, VersionRow
from fedsplit.registry.version import LATEST, PRODUCTION, Promotion, Record, Version

FORMAT = 1


class Books:
    """What stands in the database, for one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def versions(self, task: str = "") -> list[Version]:
        """All versions, or a task's; by task, then by number."""
        rows = select(VersionRow).order_by(VersionRow.task, VersionRow.number)
        if task:
            rows = rows.where(VersionRow.task == task)
        return self._versions(self._session.scalars(rows))

    def of_digest(self, digest: str) -> list[Version]:
        """The versions with a digest: one a task that has these files."""
        rows = select(VersionRow).where(VersionRow.digest == digest).order_by(VersionRow.id)
        return self._versions(self._session.scalars(rows))

    def get(self, reference: str) -> Version:
        """The version that is meant. Raises ConfigError where none is, or more than one."""
        named = Reference.read(reference)
        shown = printable(reference, limit=200)
        found = self._named(named)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(version.name for version in found[:10])
            raise ConfigError(f"{shown!r} may mean {len(found)} modules: {names}; name one of them")
        raise ConfigError(f"there is no module {shown!r} in the registry; {self._instead(named)}")

    def keep(self, record: Record) -> None:
        """A new version, or what is known of one now."""
        text = record.model_dump_json()
        row = self._row(record.task, record.digest)
        if row is not None:
            row.record = text
            return
        self._session.add(
            VersionRow(task=record.task, number=record.number, digest=record.digest, record=text)
        )
        self.give_number(record.task, record.number)

    def drop(self, version: Version) -> None:
        """A version is no more."""
        self._session.delete(self._row(version.task, version.digest))
        self._session.execute(
            delete(AliasRow).where(AliasRow.task == version.task, AliasRow.digest == version.digest)
        )

    def next_number(self, task: str) -> int:
        """A number that the task never gave."""
        row = self._session.get(NumberRow, task)
        return row.last + 1 if row is not None else 1

    def give_number(self, task: str, number: int) -> None:
        """The number is given."""
        row = self._session.get(NumberRow, task)
        if row is None:
            self._session.add(NumberRow(task=task, last=number))
            self._session.flush()
        else:
            row.last = max(row.last, number)

    def aliases(self) -> dict[str, dict[str, str]]:
        """Task -> alias -> digest."""
        found: dict[str, dict[str, str]] = {}
        rows = select(AliasRow).order_by(AliasRow.task, AliasRow.alias)
        for row in self._session.scalars(rows):
            found.setdefault(row.task, {})[row.alias] = row.digest
        return found

    def point(self, task: str, alias: str, digest: str) -> None:
        """Have an alias point there."""
        row = self._session.get(AliasRow, (task, alias))
        if row is None:
            self._session.add(AliasRow(task=task, alias=alias, digest=digest))
        else:
            row.digest = digest

    def moved(self, promotion: Promotion) -> None:
        """Note a move of an alias."""
        self._session.add(PromotionRow(task=promotion.task, record=promotion.model_dump_json()))

    def history(self, task: str = "") -> list[Promotion]:
        """All moves of a task's aliases, oldest first."""
        rows = select(PromotionRow).order_by(PromotionRow.id)
        if task:
            rows = rows.where(PromotionRow.task == task)
        return [Promotion.model_validate_json(row.record) for row in self._session.scalars(rows)]

    def aliases_text(self) -> str:
        """What aliases.json says."""
        self._session.flush()
        said = {
            "format": FORMAT,
            "aliases": self.aliases(),
            "numbers": {row.task: row.last for row in self._session.scalars(select(NumberRow))},
            "promotions": [p.model_dump(mode="json") for p in self.history()],
        }
        return json.dumps(said, ensure_ascii=False, indent=1) + "\n"

    def _named(self, named: Reference) -> list[Version]:
        if named.number:
            return [v for v in self.versions(named.task) if v.number == named.number]
        if named.alias == LATEST:
            return self.versions(named.task)[-1:]
        row = self._session.get(AliasRow, (named.task, named.alias))
        if row is not None:
            return [v for v in self.of_digest(row.digest) if v.task == named.task]
        if named.digest:
            rows = select(VersionRow).where(VersionRow.digest.startswith(named.digest))
            return self._versions(self._session.scalars(rows.order_by(VersionRow.id)))
        return []

    def _instead(self, named: Reference) -> str:
        """What there is instead."""
        of_task = self.versions(named.task)
        if of_task:
            aliases = {alias for version in of_task for alias in version.aliases}
            numbers = [v.number for v in of_task]
            there = (
                f"task {named.task} has the numbers {numbers[0]} to {numbers[-1]} "
                f"and the aliases {', '.join(sorted(aliases)) or '(none)'}"
            )
            if named.alias == PRODUCTION and PRODUCTION not in aliases:
                there += f". Name {of_task[-1].name}, or promote it: fedsplit module promote {of_task[-1].name}"
            return there
        rows = self._session.execute(
            select(VersionRow.task, func.count()).group_by(VersionRow.task).limit(20)
        )
        tasks = ", ".join(task for task, _ in rows)
        return f"its tasks are: {tasks}" if tasks else "it holds none yet; each run adds one"

    def _row(self, task: str, digest: str) -> VersionRow | None:
        found = select(VersionRow).where(VersionRow.task == task, VersionRow.digest == digest)
        return self._session.scalars(found).one_or_none()

    def _versions(self, rows: Iterable[VersionRow]) -> list[Version]:
        aliases: dict[tuple[str, str], list[str]] = {}
        for alias in self._session.scalars(select(AliasRow).order_by(AliasRow.alias)):
            aliases.setdefault((alias.task, alias.digest), []).append(alias.alias)
        return [
            Version.model_validate_json(row.record, context=None).model_copy(
                update={"aliases": tuple(aliases.get((row.task, row.digest), ()))}
            )
            for row in rows
        ]


def versions_text(records: Iterable[Record]) -> str:
    """What version.json says: one version for each task that has these files."""
    said = {"format": FORMAT, "versions": [record.model_dump(mode="json") for record in records]}
    return json.dumps(said, ensure_ascii=False, indent=1) + "\n"
