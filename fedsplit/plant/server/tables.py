"""registry.db: its tables, and transactions that two processes may hold at once (the CLI and the control service).

SQLite with a write-ahead log. Each transaction takes the write lock at its start, so what it has read still holds when
it writes. Times are seconds since the epoch.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import URL, ForeignKey, create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, FolderError
from fedsplit.core.whole_files import hand_over

VERSION = 1
Standing = Literal["member", "revoked", "rotated", "not-member"]
How = Literal["write", "note", "read"]
LOCK_S = 20.0
"""How long a transaction waits for another one's end; a join holds the lock while it asks Flower."""


class _Base(DeclarativeBase):
    pass


class Site(_Base):
    """A name that is invited, a member, or was one."""

    __tablename__ = "sites"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    folded: Mapped[str] = mapped_column(unique=True)
    """Without capitals and widths: two names that look alike are one."""
    common_name: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str]
    invited: Mapped[float]
    joined: Mapped[float] = mapped_column(default=0.0)
    last_seen: Mapped[float] = mapped_column(default=0.0)
    report: Mapped[str] = mapped_column(default="")
    """The last report, JSON."""
    codes: Mapped[list[Code]] = relationship(back_populates="site")
    certificates: Mapped[list[Certificate]] = relationship(back_populates="site")
    node_keys: Mapped[list[NodeKey]] = relationship(back_populates="site")

    def end_codes(self, why: str) -> None:
        """No code that was not used is of use any more; a used one is not either where the site is put out."""
        for code in self.codes:
            if not code.ended and (not code.used or why == "revoked"):
                code.ended = why

    def cease(self, why: str) -> tuple[str, ...]:
        """End what the site was known by until now; gives its node keys."""
        for certificate in self.certificates:
            certificate.ceased = certificate.ceased or why
        keys = [k for k in self.node_keys if not k.ceased]
        for key in keys:
            key.ceased = why
        return tuple(k.key for k in keys)

    def code_expires(self, now: float) -> float:
        """Until when a code may still be used; 0 where there is none."""
        live = (c.expires for c in self.codes if not c.used and not c.ended)
        return max((e for e in live if e > now), default=0.0)


class Code(_Base):
    """A join code. Of its secret only a salted hash is kept."""

    __tablename__ = "codes"
    id: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[int] = mapped_column(ForeignKey("sites.id"), index=True)
    salt: Mapped[bytes]
    hash: Mapped[bytes]
    expires: Mapped[float]
    tries: Mapped[int] = mapped_column(default=0)
    """With a wrong secret."""
    used: Mapped[float] = mapped_column(default=0.0)
    tls_key: Mapped[str] = mapped_column(default="")
    node_key: Mapped[str] = mapped_column(default="")
    serial: Mapped[str] = mapped_column(default="")
    ended: Mapped[str] = mapped_column(default="")
    """Why it is of no use any more, though its time is not over: "replaced", "tries", "revoked"."""
    site: Mapped[Site] = relationship(back_populates="codes")

    @staticmethod
    def hashed(salt: bytes, secret: str) -> bytes:
        """What is kept of a secret. It has 128 random bits: a slow hash would add nothing."""
        return hashlib.sha256(salt + secret.encode("utf-8", "replace")).digest()

    def opens(self, secret: str) -> bool:
        """Is it this code's?"""
        return hmac.compare_digest(self.hash, self.hashed(self.salt, secret))


class Certificate(_Base):
    """A certificate that was signed for a site."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[int] = mapped_column(ForeignKey("sites.id"), index=True)
    pem: Mapped[str]
    tls_key: Mapped[str] = mapped_column(index=True)
    """SHA-256 of its public key."""
    made: Mapped[float]
    ends: Mapped[float]
    ceased: Mapped[str] = mapped_column(default="")
    """ "", "revoked" or "rotated"."""
    site: Mapped[Site] = relationship(back_populates="certificates")

    def standing(self, now: float) -> Standing:
        """Does it let its bearer in?"""
        if self.ceased == "revoked":
            return "revoked"
        if self.ceased:
            return "rotated"
        return "member" if self.ends > now and self.site.state == "member" else "not-member"


class NodeKey(_Base):
    """A SuperNode's public key (OpenSSH). Flower takes none that has ceased ever again."""

    __tablename__ = "node_keys"
    key: Mapped[str] = mapped_column(primary_key=True)
    site_id: Mapped[int] = mapped_column(ForeignKey("sites.id"), index=True)
    ceased: Mapped[str] = mapped_column(default="")
    site: Mapped[Site] = relationship(back_populates="node_keys")


class Database(Closing):
    """The file, made at first use. Threads and processes may share it."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for another version's file, FolderError where it cannot be read or written."""
        self._path = path
        with self._translated():
            # Before SQLite does, whose own file anybody could read.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            hand_over(path)
            self._engine = create_engine(
                URL.create("sqlite", database=str(path)),
                connect_args={"timeout": LOCK_S, "check_same_thread": False},
            )
            event.listen(self._engine, "connect", _on_connect)
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
                _Base.metadata.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
        elif found != VERSION:
            word = "a newer" if found > VERSION else "an older"
            raise ConfigError(
                f"{self._path} has format {found}, this fedsplit reads {VERSION}: {word} fedsplit made it; "
                "install that one here, or restore the backup that belongs to this one"
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, OSError) as err:
            reason = err.orig if isinstance(err, DatabaseError) else err.strerror
            at = getattr(err, "filename", None) or self._path
            raise FolderError(
                f"{at} cannot be used ({reason}); nothing was changed. Free some space there, check who owns it, "
                "or restore it from the backup"
            ) from err


def _on_connect(connection: Any, _record: object) -> None:
    # Transactions are begun below, not by the driver, which begins them too late.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Connection) -> None:
    how = connection.get_execution_options().get("how", "write")
    connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if how == 'write' else 'NORMAL'}")
    connection.exec_driver_sql("BEGIN" if how == "read" else "BEGIN IMMEDIATE")
