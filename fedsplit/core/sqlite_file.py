"""An SQLite file, and transactions in it that threads and processes may hold at once.

Each transaction that writes takes the write lock at its start, so what it has read still holds when
it writes. The tables are the owner's: `plant/server/tables.py`, `registry/tables.py`. Loaded only by them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, MetaData, NullPool, create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.core.whole_files import hand_over

How = Literal["write", "note", "read"]
LOCK_S = 20.0
"""How long a transaction waits for another one's end; a join holds the lock while it asks Flower."""


class SqliteFile(Closing):
    """The file, made at first use."""

    def __init__(
        self,
        path: Path,
        metadata: MetaData,
        *,
        version: int,
        error: Callable[[str, str], FedsplitError],
        log: bool = True,
    ) -> None:
        """`version` is the format of the tables; `error(reason, file)` is what SQLite's errors become.

        With a write-ahead `log` readers wait for nobody, and two files lie beside this one. Without, a reader needs no room on
        the disk and no right to write, and each transaction opens the file anew: one that took its place is seen at once.

        Raises ConfigError for another version's file, `error` where it cannot be read or written.
        """
        self._path, self._metadata, self._version, self._error = path, metadata, version, error
        with self._translated():
            # Before SQLite does, whose own file anybody could read.
            if log or not path.exists():
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                hand_over(path)
            self._engine = create_engine(
                URL.create("sqlite", database=str(path)),
                connect_args={"timeout": LOCK_S, "check_same_thread": False},
                poolclass=None if log else NullPool,
            )
            event.listen(self._engine, "connect", _logged if log else _plain)
            event.listen(self._engine, "begin", _on_begin)
            self._check()

    def close(self) -> None:
        """Free the file."""
        self._engine.dispose()

    @contextmanager
    def begin(self, how: How = "write") -> Iterator[Session]:
        """A transaction: committed at its end, nothing of it after an error.

        write: no other one writes meanwhile, and it outlasts a power cut. note: as write, but a power cut may take it.
        read: what stands at its beginning; it waits for nobody.
        """
        with (
            self._translated(),
            self._engine.connect().execution_options(how=how) as connection,
            Session(connection, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def _check(self) -> None:
        with self._engine.connect().execution_options(how="read") as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if found == 0:
            with self._engine.begin() as connection:
                # Another process may have been first.
                self._metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {self._version}")
        elif found != self._version:
            word = "a newer" if found > self._version else "an older"
            raise ConfigError(
                f"{self._path} has format {found}, this fedsplit reads {self._version}: {word} fedsplit made it; "
                "install that one here, or restore the backup that belongs to this one"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, OSError) as err:
            reason = err.orig if isinstance(err, DatabaseError) else err.strerror
            at = getattr(err, "filename", None) or self._path
            raise self._error(str(reason), str(at)) from err


def _plain(connection: Any, _record: object) -> None:
    # Transactions are begun below, not by the driver, which begins them too late.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")


def _logged(connection: Any, record: object) -> None:
    _plain(connection, record)
    connection.execute("PRAGMA journal_mode = WAL")


def _on_begin(connection: Connection) -> None:
    how = connection.get_execution_options().get("how", "write")
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if how == 'write' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN" if how == "read" else "BEGIN IMMEDIATE")
