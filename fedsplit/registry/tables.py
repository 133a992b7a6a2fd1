"""modules.db: its tables. They hold nothing that the files beside them do not say, so they can be made anew from those."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from fedsplit.core.errors import RegistryError
from fedsplit.core.sqlite_file import SqliteFile

VERSION = 1


class _Base(DeclarativeBase):
    pass


class VersionRow(_Base):
    """A version of a task's module."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("task", "number"), UniqueConstraint("task", "digest"))
    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str]
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(index=True)
    record: Mapped[str]
    """All of it, JSON."""


class AliasRow(_Base):
    """Where an alias of a task points."""

    __tablename__ = "aliases"
    task: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]


class PromotionRow(_Base):
    """A move of an alias."""

    __tablename__ = "promotions"
    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(index=True)
    record: Mapped[str]
    """All of it, JSON."""


class NumberRow(_Base):
    """The highest number that a task has ever given."""

    __tablename__ = "numbers"
    task: Mapped[str] = mapped_column(primary_key=True)
    last: Mapped[int]


def database(path: Path) -> SqliteFile:
    """The file, made at first use. Raises ConfigError for another version's, RegistryError where it cannot be used."""
    return SqliteFile(path, _Base.metadata, version=VERSION, error=_error, log=False)


def _error(reason: str, at: str) -> RegistryError:
    if any(
        word in reason
        for word in ("malformed", "not a database", "no such table", "no such column")
    ):
        folder = Path(at).parent
        return RegistryError(
            f"{at} is damaged ({reason}); no module is lost. `fedsplit module reindex --registry {folder}` makes it anew "
            f"from the files beside it"
        )
    return RegistryError(
        f"{at} cannot be used ({reason}); nothing was changed. Free some space there, check who owns it, or try again "
        f"where another command is at work"
    )
