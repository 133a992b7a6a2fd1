"""Who belongs to the federation: sites by name, their join codes, certificates and node keys, and what has ceased.

A code is good for one use and a short time; asked again with the same keys within that time it gives the same answer,
for an answer may be lost on its way. Nothing here signs or speaks to Flower: `redeem` is given what does (`admit`) and
keeps nothing where that fails. Every change is in the audit log before it is in force. revoked.json tells the encoder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, EnrolmentError
from fedsplit.core.foreign import MAX_NAME_CHARS, checked_name, printable
from fedsplit.core.names import certificate_name, normalised
from fedsplit.core.whole_files import write_whole
from fedsplit.plant import pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.tables import Certificate, Code, Database, NodeKey, Site
from fedsplit.plant.server.trusted import public_address, public_ca
from fedsplit.plant.wire import Report

MAX_TRIES = 5
"""Wrong secrets for one code; then it is dead."""
MAX_CERTIFICATES = 20
"""Of one site, in force at once. Renewing makes one every few weeks."""

SiteState = Literal["invited", "member", "revoked"]
Standing = Literal["member", "revoked", "rotated", "not-member"]


@dataclass(frozen=True)
class SiteRow:
    """A site as it stands. Times are seconds since the epoch, 0 for never."""

    name: str
    common_name: str
    """Its name in certificates."""
    state: SiteState
    serial: str
    certificate_ends: float
    node_key: str
    joined: float
    last_seen: float
    report: Report | None
    code_expires: float
    """Until when a code may still be used; 0 where there is none."""


@dataclass(frozen=True)
class Keys:
    """What a site asks to be known by: SHA-256 of its TLS key (hex), its SuperNode's public key (OpenSSH)."""

    tls: str
    node: str


@dataclass(frozen=True)
class Admitted:
    """A site that is a member now. `ceased` are its node keys before, which Flower must forget."""

    name: str
    certificate: bytes
    ceased: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """Whose certificate has a serial, and how it stands."""

    name: str
    common_name: str
    standing: Standing


class Registry(Closing):
    """The registry of a federation folder; safe in several threads and processes at once."""

    def __init__(self, folder: FederationFolder, *, now: Callable[[], float] = time.time) -> None:
        """Raises ConfigError for a registry of another version, FolderError where it cannot be used."""
        self._folder, self._now = folder, now
        self._db = Database(folder.registry)

    def close(self) -> None:
        """Free the file."""
        self._db.close()

    def add_site(self, name: str, hours: float) -> JoinCode:
        """Invite a site; the code is good for `hours`. Raises ConfigError for a name that is taken or of no use."""
        name = _usable(name)
        with self._db.begin() as session:
            site = _alike(session, name)
            if site is None:
                site = Site(
                    name=name,
                    folded=_folded(name),
                    common_name=certificate_name(name),
                    state="invited",
                    invited=self._now(),
                )
                session.add(site)
            else:
                self._check_free(site, name)
            site.state = "invited"
            session.flush()
            code = self._new_code(session, site, hours)
            audit.record(self._folder, "invited", name, code=code.id, hours=hours)
        # A revoked name that is invited again is on the list by its serials alone.
        self.tell_encoder()
        return code

    def rotate(self, name: str, hours: float) -> JoinCode:
        """A new code for a site that is there: it joins again with new keys, and the old ones cease then.

        Raises ConfigError for a site that is not there or revoked.
        """
        with self._db.begin() as session:
            site = _named(session, name)
            if site.state == "revoked":
                raise ConfigError(
                    f"site {printable(site.name)!r} is revoked; `fedsplit federation add-site {site.name}` invites it again"
                )
            code = self._new_code(session, site, hours)
            audit.record(self._folder, "new-code", site.name, code=code.id, hours=hours)
        return code

    def redeem(
        self, code_id: str, secret: str, keys: Keys, admit: Callable[[str, str], bytes]
    ) -> Admitted:
        """Make the site of a code a member. `admit` gets name and common name and gives the certificate (PEM).

        Raises EnrolmentError for a code or a key that will not do, and what `admit` raises; then the code is as good
        as before.
        """
        admitted = None
        with self._db.begin() as session:
            code = session.get(Code, code_id)
            if code is None:
                raise _unknown()
            if _is_secret(code, secret):
                admitted = self._admitted(session, code, keys, admit)
            else:
                self._count(code)
        if admitted is None:
            raise _unknown()
        self.tell_encoder()
        return admitted

    def is_open(self, code_id: str) -> bool:
        """Is there a code of that id that may still be used?"""
        with self._db.begin("read") as session:
            code = session.get(Code, code_id)
            return code is not None and not code.ended and code.expires > self._now()

    def revoke(self, name: str) -> tuple[str, ...]:
        """A site is no member from now on. Gives its node keys, which Flower must forget. Raises ConfigError."""
        with self._db.begin() as session:
            site = _named(session, name)
            _end_codes(site, "revoked")
            keys = _cease(site, "revoked")
            was, site.state = site.state, "revoked"
            if was != "revoked":
                audit.record(self._folder, "revoked", site.name, was=was)
            found = keys or tuple(k.key for k in site.node_keys if k.ceased == "revoked")
        self.tell_encoder()
        return found

    def renew(self, serial: str, tls_key: str, issue: Callable[[str], bytes]) -> bytes:
        """Another certificate for the site of `serial`, which must be in force. `issue` gets the common name.

        The same key gets the same certificate, for an answer may be lost. Raises EnrolmentError.
        """
        with self._db.begin() as session:
            old = session.get(Certificate, _canonical(serial))
            if old is None or self._standing(old) != "member":
                raise EnrolmentError(
                    "this certificate is not in force; join again with a new code",
                    kind="not-member",
                )
            site = old.site
            same = session.scalar(select(Certificate).where(Certificate.tls_key == tls_key))
            if same is not None and (same.site is not site or same.ceased):
                raise _key_in_use(same.ceased)
            if same is not None and same.ends - self._now() > (same.ends - same.made) / 2:
                return same.pem.encode()
            if (
                sum(1 for c in site.certificates if self._standing(c) == "member")
                > MAX_CERTIFICATES
            ):
                raise EnrolmentError(
                    f"site {printable(site.name)!r} has {MAX_CERTIFICATES} certificates in force; renew later",
                    kind="too-many",
                )
            pem = issue(site.common_name)
            made = self._keep(session, site, pem, tls_key)
            audit.record(self._folder, "renewed", site.name, serial=made.serial)
        return pem

    def shown(self, serial: str) -> Shown:
        """Whose certificate it is, and whether it is in force now."""
        with self._db.begin("read") as session:
            found = session.get(Certificate, _canonical(serial))
            if found is None:
                return Shown("", "", "not-member")
            return Shown(found.site.name, found.site.common_name, self._standing(found))

    def seen(self, name: str, report: Report) -> None:
        """A site has said how it is."""
        with self._db.begin("note") as session:
            site = _named(session, name)
            site.last_seen, site.report = self._now(), report.model_dump_json()

    def sites(self) -> list[SiteRow]:
        """All sites, by name."""
        with self._db.begin("read") as session:
            return [self._row(s) for s in session.scalars(select(Site).order_by(Site.name))]

    def node_keys(self) -> dict[str, str]:
        """Public key -> site, of all that Flower should know."""
        with self._db.begin("read") as session:
            rows = session.scalars(select(NodeKey).where(NodeKey.ceased == ""))
            return {row.key: row.site.name for row in rows if row.site.state == "member"}

    def ceased_node_keys(self) -> set[str]:
        """Public keys that Flower must not know any more."""
        with self._db.begin("read") as session:
            return set(session.scalars(select(NodeKey.key).where(NodeKey.ceased != "")))

    def tell_encoder(self) -> None:
        """Write revoked.json, by which the encoder ends streams. Raises FolderError."""
        # The lock of the transaction keeps two writers in their order.
        with self._db.begin("note") as session:
            gone = session.scalars(
                select(Certificate.serial).where(
                    Certificate.ceased != "", Certificate.ends > self._now()
                )
            )
            names = session.scalars(select(Site.common_name).where(Site.state == "revoked"))
            told = {"serials": sorted(gone), "names": sorted(names)}
            self._folder.present.mkdir(mode=0o700, exist_ok=True)
            write_whole(self._folder.revoked, json.dumps(told) + "\n", mode=0o600)

    def _new_code(self, session: Session, site: Site, hours: float) -> JoinCode:
        _end_codes(site, "replaced")
        code = JoinCode.new(
            public_address(self._folder), pki.fingerprint(public_ca(self._folder)[-1])
        )
        salt = secrets.token_bytes(16)
        session.add(
            Code(
                id=code.id,
                site_id=site.id,
                salt=salt,
                hash=_hash(salt, code.secret),
                expires=self._now() + hours * 3600,
            )
        )
        return code

    def _check_free(self, site: Site, name: str) -> None:
        """Raise ConfigError unless the name may be invited (again)."""
        if site.name != name:
            raise ConfigError(
                f"the name {printable(name)!r} is too like {printable(site.name)!r}, which is there; choose another one"
            )
        if site.state == "member":
            raise ConfigError(
                f"site {printable(name)!r} is a member already; choose another name, or give it new keys with "
                f"`fedsplit federation rotate {name}`"
            )
        if site.state == "invited" and self._code_expires(site):
            raise ConfigError(
                f"site {printable(name)!r} is invited already, and its code is still good; "
                f"`fedsplit federation rotate {name}` makes a new code, and the old one is void then"
            )

    def _count(self, code: Code) -> None:
        code.tries += 1
        if code.tries == MAX_TRIES and not code.ended:
            code.ended = "tries"
            audit.record(
                self._folder, "code-dead", code.site.name, code=code.id, reason="too many tries"
            )

    def _admitted(
        self, session: Session, code: Code, keys: Keys, admit: Callable[[str, str], bytes]
    ) -> Admitted:
        site, now = code.site, self._now()
        again = f"on the server, `fedsplit federation rotate {site.name}` makes a new one"
        same = (code.tls_key, code.node_key) == (keys.tls, keys.node)
        made = session.get(Certificate, code.serial)
        if code.used and same and made is not None and not made.ceased and code.expires > now:
            return Admitted(site.name, made.pem.encode())
        if code.ended == "revoked":
            raise EnrolmentError(
                f"site {printable(site.name)!r} was revoked, and this code with it; on the server, "
                f"`fedsplit federation add-site {site.name}` invites it again",
                kind="code-ended",
            )
        if code.used:
            raise EnrolmentError(f"this join code was used already; {again}", kind="code-used")
        if code.ended:
            why = "tried too often with a wrong secret" if code.ended == "tries" else code.ended
            raise EnrolmentError(f"this join code is void ({why}); {again}", kind="code-ended")
        if code.expires <= now:
            raise EnrolmentError(f"this join code has expired; {again}", kind="code-expired")
        self._check_new(session, keys)
        pem = admit(site.name, site.common_name)
        ceased = _cease(site, "rotated")
        rejoined, site.state, site.joined = site.joined > 0, "member", now
        certificate = self._keep(session, site, pem, keys.tls)
        session.add(NodeKey(key=keys.node, site_id=site.id))
        code.used, code.tls_key, code.node_key = now, keys.tls, keys.node
        code.serial = certificate.serial
        audit.record(
            self._folder,
            "joined",
            site.name,
            code=code.id,
            serial=certificate.serial,
            again=rejoined,
        )
        return Admitted(site.name, pem, ceased)

    def _check_new(self, session: Session, keys: Keys) -> None:
        """Raise EnrolmentError for keys that anybody had before: what may be in other hands must not come back."""
        if (node := session.get(NodeKey, keys.node)) is not None:
            raise _key_in_use(node.ceased)
        tls = session.scalar(select(Certificate).where(Certificate.tls_key == keys.tls))
        if tls is not None:
            raise _key_in_use(tls.ceased)

    def _keep(self, session: Session, site: Site, pem: bytes, tls_key: str) -> Certificate:
        certificate = pki.read_certificate(pem)
        row = Certificate(
            serial=_canonical(pki.serial(certificate)),
            site_id=site.id,
            pem=pem.decode("ascii"),
            tls_key=tls_key,
            made=self._now(),
            ends=certificate.not_valid_after_utc.timestamp(),
        )
        session.add(row)
        return row

    def _standing(self, certificate: Certificate) -> Standing:
        if certificate.ceased == "revoked":
            return "revoked"
        if certificate.ceased:
            return "rotated"
        in_time = certificate.ends > self._now()
        return "member" if in_time and certificate.site.state == "member" else "not-member"

    def _code_expires(self, site: Site) -> float:
        live = (c.expires for c in site.codes if not c.used and not c.ended)
        return max((e for e in live if e > self._now()), default=0.0)

    def _row(self, site: Site) -> SiteRow:
        live = [c for c in site.certificates if not c.ceased]
        newest = max(live, key=lambda c: c.made, default=None)
        keys = [k.key for k in site.node_keys if not k.ceased]
        try:
            report = Report.model_validate_json(site.report) if site.report else None
        except ValidationError:
            report = None  # Another version's; the next one comes in seconds.
        return SiteRow(
            name=site.name,
            common_name=site.common_name,
            state=site.state,  # type: ignore[arg-type]
            serial=newest.serial if newest else "",
            certificate_ends=newest.ends if newest else 0.0,
            node_key=keys[0] if keys else "",
            joined=site.joined,
            last_seen=site.last_seen,
            report=report,
            code_expires=self._code_expires(site),
        )


def _usable(name: str) -> str:
    """A site's name in its one form. Raises ConfigError."""
    name = normalised(name)
    try:
        checked_name(name)
    except ValueError as err:
        raise ConfigError(f"site name {err}") from err
    if not 0 < len(name) <= MAX_NAME_CHARS or name != name.strip():
        raise ConfigError(
            f"site name {printable(name)!r} has {len(name)} characters; 1 to {MAX_NAME_CHARS} are wanted, without blanks "
            "at its ends"
        )
    return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _alike(session: Session, name: str) -> Site | None:
    """The site of that name, or of one that looks like it or has its name in certificates."""
    common = certificate_name(name).casefold()
    found = session.scalars(select(Site)).all()
    return next(
        (
            s
            for s in found
            if s.folded == _folded(name) or common in (s.common_name.casefold(), s.folded)
        ),
        None,
    )


def _named(session: Session, name: str) -> Site:
    """Raises ConfigError where there is none."""
    site = session.scalar(select(Site).where(Site.name == normalised(name)))
    if site is None:
        raise ConfigError(
            f"there is no site {printable(name, limit=MAX_NAME_CHARS)!r}; `fedsplit federation list` shows all"
        )
    return site


def _end_codes(site: Site, why: str) -> None:
    for code in site.codes:
        if not code.ended and (not code.used or why == "revoked"):
            code.ended = why


def _cease(site: Site, why: str) -> tuple[str, ...]:
    """End what the site was known by until now; gives its node keys."""
    keys = [k for k in site.node_keys if not k.ceased]
    for certificate in site.certificates:
        certificate.ceased = certificate.ceased or why
    for key in keys:
        key.ceased = why
    return tuple(k.key for k in keys)


def _canonical(serial: str) -> str:
    """A serial number as it is kept, however a proxy writes it."""
    return serial.replace(":", "").upper().lstrip("0")


def _hash(salt: bytes, secret: str) -> bytes:
    # 128 random bits: a slow hash would add nothing.
    return hashlib.sha256(salt + secret.encode("utf-8", "replace")).digest()


def _is_secret(code: Code, secret: str) -> bool:
    return hmac.compare_digest(code.hash, _hash(code.salt, secret))


def _unknown() -> EnrolmentError:
    return EnrolmentError(
        "this federation does not know the join code: it is another federation's, or void; "
        "on the server, `fedsplit federation add-site` or `rotate` makes a new one",
        kind="code-unknown",
    )


def _key_in_use(ceased: str) -> EnrolmentError:
    why = f"was in force before and is {ceased} now" if ceased else "is in use already"
    return EnrolmentError(
        f"the key that the site shows {why}; a site that joins again needs new keys: run `fedsplit site join` in a new "
        "folder, or with --again in its old one",
        kind="key-used",
    )
