"""registry.db: its tables. The CLI and the control service use it at once. Times are seconds since the epoch."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Literal

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from fedsplit.core.errors import FolderError
from fedsplit.core.sqlite_file import SqliteFile

VERSION = 1
Standing = Literal["member", "revoked", "rotated", "not-member"]


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


def database(path: Path) -> SqliteFile:
    """The file, made at first use. Raises ConfigError for another version's, FolderError where it cannot be used."""
    return SqliteFile(path, _Base.metadata, version=VERSION, error=_error)


def _error(reason: str, at: str) -> FolderError:
    return FolderError(
        f"{at} cannot be used ({reason}); nothing was changed. Free some space there, check who owns it, "
        "or restore it from the backup"
    )
