"""A site's keys and certificate: made here, never sent, changed as a whole.

    .joining/   keys of a join that is under way, with the id of its code: the same command goes on with them
    .old/       what was in force before a rejoin, until the new keys have been used once
    *.next      the next pair of a renewal

A certificate and its key are two files, so no step changes both at once: `repaired` ends a change that a power cut
broke off in the middle.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedsplit.core.errors import ConfigError
from fedsplit.core.whole_files import write_whole
from fedsplit.plant import pki
from fedsplit.plant.site.folder import SiteFolder

JOINING = ".joining"
OLD = ".old"
_CODE = "code-id"
_PRIVATE = ("site-key.pem", "node-key")


@dataclass(frozen=True)
class JoiningKeys:
    """The keys of a join that is under way."""

    folder: Path
    key: pki.Key
    node_private: bytes
    node_public: str

    @classmethod
    def of(cls, site: Path, code_id: str) -> JoiningKeys:
        """Those that were made for this code, or new ones. Raises OSError."""
        folder = site / JOINING
        if code_of(site) == code_id:
            with contextlib.suppress(OSError, ConfigError):
                return cls(
                    folder,
                    pki.read_key((folder / "site-key.pem").read_bytes()),
                    (folder / "node-key").read_bytes(),
                    pki.read_node_key((folder / "node-key.pub").read_text(encoding="ascii")),
                )
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        private, public = pki.new_node_key()
        made = cls(folder, pki.new_key(), private, public)
        for name, data in made.files.items():
            write_whole(folder / name, data, mode=0o600)
        # Last: who finds it finds all the others.
        write_whole(folder / _CODE, code_id, mode=0o600)
        return made

    @property
    def files(self) -> dict[str, str]:
        """Name -> content, as they stand in a site folder."""
        return {
            "site-key.pem": pki.key_pem(self.key).decode("ascii"),
            "node-key": self.node_private.decode("ascii"),
            "node-key.pub": f"{self.node_public}\n",
        }

    def forget(self) -> None:
        """The join is over."""
        shutil.rmtree(self.folder, ignore_errors=True)


def code_of(site: Path) -> str:
    """The id of the code of a join that is under way there; empty where none is."""
    try:
        return (site / JOINING / _CODE).read_text(encoding="ascii")[:200]
    except (OSError, UnicodeDecodeError):
        return ""


def put(folder: Path, files: Mapping[str, str], *, keep_old: bool) -> None:
    """Write keys and certificates into a site folder; with `keep_old` what they replace goes into .old. Raises OSError."""
    old = folder / OLD
    if keep_old and not old.exists():
        old.mkdir(mode=0o700)
        for name in files:
            if (folder / name).is_file():
                shutil.copy2(folder / name, old / name)
    for name, data in files.items():
        write_whole(folder / name, data, mode=0o600 if name in _PRIVATE else 0o644)
    forget_next(SiteFolder(folder))


def forget_old(folder: Path) -> None:
    """The new keys have been used: those before are needed no more."""
    shutil.rmtree(folder / OLD, ignore_errors=True)


def next_key(folder: SiteFolder) -> pki.Key:
    """The key of the next certificate: the one that was made for it already, or a new one. Raises OSError."""
    path = _next(folder.certificate_key)
    with contextlib.suppress(OSError, ConfigError):
        return pki.read_key(path.read_bytes())
    key = pki.new_key()
    write_whole(path, pki.key_pem(key).decode("ascii"), mode=0o600)
    return key


def forget_next(folder: SiteFolder) -> None:
    """The next pair is not to be: the server refuses its key, or the site has joined again. Raises OSError."""
    for path in (folder.certificate, folder.certificate_key):
        _next(path).unlink(missing_ok=True)


def take_next(folder: SiteFolder, certificate: str) -> None:
    """Put the next pair in force. Raises OSError, ConfigError where the certificate is not the key's."""
    made = pki.read_certificate(certificate.encode(), what="the renewed certificate")
    if not _match(made, _next(folder.certificate_key)):
        raise ConfigError("the server sent a certificate of another key; the present one stays")
    write_whole(_next(folder.certificate), certificate)
    _swap(folder)


def repaired(folder: SiteFolder) -> None:
    """End a change of the pair that was broken off. Raises OSError."""
    if not _next(folder.certificate).is_file():
        return
    with contextlib.suppress(OSError, ConfigError):
        made = pki.read_certificate(_next(folder.certificate).read_bytes())
        if _match(made, _next(folder.certificate_key)) or _match(made, folder.certificate_key):
            _swap(folder)
            return
    _next(folder.certificate).unlink(missing_ok=True)


def certificate(folder: SiteFolder) -> x509.Certificate:
    """The site's own. Raises ConfigError for one that cannot be read or is not its key's."""
    path = folder.certificate
    try:
        found = pki.read_certificate(path.read_bytes(), what=str(path))
    except OSError as err:
        raise ConfigError(
            f"{path} cannot be read ({err.strerror}); join again with a new code: fedsplit site join CODE --dir SITE"
        ) from err
    if not _match(found, folder.certificate_key):
        raise ConfigError(
            f"{folder.certificate_key} is not the key of {path.name}; restore both from one backup, or join again with a "
            f"new code: fedsplit site join CODE --dir SITE"
        )
    return found


def ends(found: x509.Certificate) -> float:
    """When a certificate is over, in seconds since the epoch."""
    return found.not_valid_after_utc.timestamp()


def day(moment: float) -> str:
    """A moment as a person reads it, with its time zone."""
    return f"{datetime.datetime.fromtimestamp(moment, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _next(path: Path) -> Path:
    return path.with_name(f"{path.name}.next")


def _swap(folder: SiteFolder) -> None:
    if _next(folder.certificate_key).is_file():
        _next(folder.certificate_key).replace(folder.certificate_key)
    _next(folder.certificate).replace(folder.certificate)


def _match(found: x509.Certificate, key: Path) -> bool:
    try:
        public = pki.read_key(key.read_bytes()).public_key()
    except (OSError, ConfigError):
        return False
    as_pem = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return found.public_key().public_bytes(*as_pem) == public.public_bytes(*as_pem)
