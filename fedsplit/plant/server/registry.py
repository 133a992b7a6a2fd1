"""Who belongs to the federation: sites by name, who is invited, who is a member, who is out, and how each one does.

What the server's own people do stands here; what a site does with its code and its certificate, in admission.py. Every
change is in the audit log before it is in force. revoked.json tells the encoder whom it must not let in.
"""

from __future__ import annotations

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
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import MAX_NAME_CHARS, checked_name, printable
from fedsplit.core.names import certificate_name, normalised
from fedsplit.core.proxied import bare_serial
from fedsplit.core.whole_files import hand_over, write_whole
from fedsplit.plant import pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server import audit, usage
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.tables import Certificate, Code, NodeKey, Site, Standing, database
from fedsplit.plant.server.trusted import public_address, public_ca
from fedsplit.plant.wire import DayUsage, Report

SiteState = Literal["invited", "member", "revoked"]


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
class Shown:
    """Whose certificate has a serial, and how it stands."""

    name: str
    common_name: str
    standing: Standing


class Registry(Closing):
    """The registry of a federation folder; safe in several threads and processes at once."""

    def __init__(self, folder: FederationFolder, *, now: Callable[[], float] = time.time) -> None:
        """Raises ConfigError for a registry of another version, FolderError where it cannot be used."""
        self.folder, self.now = folder, now
        self.db = database(folder.registry)

    def close(self) -> None:
        """Free the file."""
        self.db.close()

    def add_site(self, name: str, hours: float) -> JoinCode:
        """Invite a site; the code is good for `hours`. Raises ConfigError for a name that is taken or of no use."""
        name = _usable(name)
        with self.db.begin() as session:
            site = _alike(session, name)
            if site is None:
                site = Site(
                    name=name,
                    folded=_folded(name),
                    common_name=certificate_name(name),
                    state="invited",
                    invited=self.now(),
                )
                session.add(site)
            else:
                self._check_free(site, name)
            site.state = "invited"
            session.flush()
            code = self._new_code(session, site, hours)
            audit.record(self.folder, "invited", name, code=code.id, hours=hours)
        # A revoked name that is invited again is on the list by its serials alone.
        self.tell_encoder()
        return code

    def rotate(self, name: str, hours: float) -> JoinCode:
        """A new code for a site that is there: it joins again with new keys, and the old ones cease then.

        Raises ConfigError for a site that is not there or revoked.
        """
        with self.db.begin() as session:
            site = _named(session, name)
            if site.state == "revoked":
                raise ConfigError(
                    f"site {printable(site.name)!r} is revoked; `fedsplit federation add-site {site.name}` invites it again"
                )
            code = self._new_code(session, site, hours)
            audit.record(self.folder, "new-code", site.name, code=code.id, hours=hours)
        return code

    def revoke(self, name: str) -> tuple[str, ...]:
        """A site is no member from now on. Gives its node keys, which Flower must forget. Raises ConfigError."""
        with self.db.begin() as session:
            site = _named(session, name)
            site.end_codes("revoked")
            keys = site.cease("revoked")
            was, site.state = site.state, "revoked"
            if was != "revoked":
                audit.record(self.folder, "revoked", site.name, was=was)
            found = keys or tuple(k.key for k in site.node_keys if k.ceased == "revoked")
        self.tell_encoder()
        return found

    def shown(self, serial: str) -> Shown:
        """Whose certificate it is, and whether it is in force now."""
        with self.db.begin("read") as session:
            found = session.get(Certificate, bare_serial(serial))
            if found is None:
                return Shown("", "", "not-member")
            return Shown(found.site.name, found.site.common_name, found.standing(self.now()))

    def seen(self, name: str, report: Report) -> None:
        """A site has said how it is."""
        with self.db.begin("note") as session:
            site = _named(session, name)
            site.last_seen, site.report = self.now(), report.model_dump_json()
            usage.keep(session, site.name, report.usage)

    def usage(self, name: str, *, most: int = usage.DAYS_KEPT) -> list[DayUsage]:
        """What a site's modules answered a day, oldest first: the last `most` entries."""
        with self.db.begin("read") as session:
            return usage.kept(session, normalised(name), most=most)

    def task_of(self, name: str) -> str:
        """The task of a site's data, by its last report; empty where it has said none."""
        with self.db.begin("read") as session:
            report = _report(_named(session, name))
            return report.task if report else ""

    def sites(self) -> list[SiteRow]:
        """All sites, by name."""
        with self.db.begin("read") as session:
            return [self._row(s) for s in session.scalars(select(Site).order_by(Site.name))]

    def node_keys(self) -> dict[str, str]:
        """Public key -> site, of all that Flower should know."""
        with self.db.begin("read") as session:
            rows = session.scalars(select(NodeKey).where(NodeKey.ceased == ""))
            return {row.key: row.site.name for row in rows if row.site.state == "member"}

    def ceased_node_keys(self) -> set[str]:
        """Public keys that Flower must not know any more."""
        with self.db.begin("read") as session:
            return set(session.scalars(select(NodeKey.key).where(NodeKey.ceased != "")))

    def tell_encoder(self) -> None:
        """Write revoked.json, by which the encoder ends streams. Raises FolderError."""
        # The lock of the transaction keeps two writers in their order.
        with self.db.begin("note") as session:
            gone = session.scalars(
                select(Certificate.serial).where(
                    Certificate.ceased != "", Certificate.ends > self.now()
                )
            )
            names = session.scalars(select(Site.common_name).where(Site.state == "revoked"))
            told = {"serials": sorted(gone), "names": sorted(names)}
            self.folder.present.mkdir(mode=0o700, exist_ok=True)
            hand_over(self.folder.present)
            write_whole(self.folder.revoked, json.dumps(told) + "\n", mode=0o600)

    def _new_code(self, session: Session, site: Site, hours: float) -> JoinCode:
        site.end_codes("replaced")
        code = JoinCode.new(
            public_address(self.folder), pki.fingerprint(public_ca(self.folder)[-1])
        )
        salt = secrets.token_bytes(16)
        session.add(
            Code(
                id=code.id,
                site_id=site.id,
                salt=salt,
                hash=Code.hashed(salt, code.secret),
                expires=self.now() + hours * 3600,
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
        if site.state == "invited" and site.code_expires(self.now()):
            raise ConfigError(
                f"site {printable(name)!r} is invited already, and its code is still good; "
                f"`fedsplit federation rotate {name}` makes a new code, and the old one is void then"
            )

    def _row(self, site: Site) -> SiteRow:
        live = [c for c in site.certificates if not c.ceased]
        newest = max(live, key=lambda c: c.made, default=None)
        keys = [k.key for k in site.node_keys if not k.ceased]
        return SiteRow(
            name=site.name,
            common_name=site.common_name,
            state=site.state,  # type: ignore[arg-type]
            serial=newest.serial if newest else "",
            certificate_ends=newest.ends if newest else 0.0,
            node_key=keys[0] if keys else "",
            joined=site.joined,
            last_seen=site.last_seen,
            report=_report(site),
            code_expires=site.code_expires(self.now()),
        )


def _report(site: Site) -> Report | None:
    try:
        return Report.model_validate_json(site.report) if site.report else None
    except ValidationError:
        return None  # Another version's; the next one comes in seconds.


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
