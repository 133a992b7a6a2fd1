"""How a site gets in and stays in: it redeems a join code, and renews its certificate.

A code is good for one use and a short time; asked again with the same keys within that time it gives the same answer,
for an answer may be lost on its way. Nothing here signs or speaks to Flower: `redeem` is given what does (`admit`), and
keeps nothing where that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedsplit.core.errors import EnrolmentError
from fedsplit.core.foreign import printable
from fedsplit.core.proxied import bare_serial
from fedsplit.plant import pki
from fedsplit.plant.server import audit
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.tables import Certificate, Code, NodeKey, Site

MAX_TRIES = 5
"""Wrong secrets for one code; then it is dead."""
MAX_CERTIFICATES = 20
"""Of one site, in force at once. Renewing makes one every few weeks."""


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


class Admission:
    """Codes and certificates of a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def redeem(
        self, code_id: str, secret: str, keys: Keys, admit: Callable[[str, str], bytes]
    ) -> Admitted:
        """Make the site of a code a member. `admit` gets name and common name and gives the certificate (PEM).

        Raises EnrolmentError for a code or a key that will not do, and what `admit` raises; then the code is as good
        as before.
        """
        admitted = None
        with self._registry.db.begin() as session:
            code = session.get(Code, code_id)
            if code is None:
                raise _unknown()
            if code.opens(secret):
                admitted = self._admitted(session, code, keys, admit)
            else:
                self._count(code)
        if admitted is None:
            raise _unknown()
        self._registry.tell_encoder()
        return admitted

    def is_open(self, code_id: str) -> bool:
        """Is there a code of that id that may still be used?"""
        with self._registry.db.begin("read") as session:
            code = session.get(Code, code_id)
            return code is not None and not code.ended and code.expires > self._registry.now()

    def renew(self, serial: str, tls_key: str, issue: Callable[[str], bytes]) -> bytes:
        """Another certificate for the site of `serial`, which must be in force. `issue` gets the common name.

        The same key gets the same certificate, for an answer may be lost. Raises EnrolmentError.
        """
        now = self._registry.now()
        with self._registry.db.begin() as session:
            old = session.get(Certificate, bare_serial(serial))
            if old is None or old.standing(now) != "member":
                raise EnrolmentError(
                    "this certificate is not in force; join again with a new code",
                    kind="not-member",
                )
            site = old.site
            same = _newest_of(session, tls_key)
            if same is not None and (same.site is not site or same.ceased):
                raise _key_in_use(same.ceased)
            if same is not None and same.ends - now > (same.ends - same.made) / 2:
                return same.pem.encode()
            in_force = [c for c in site.certificates if c.standing(now) == "member"]
            if len(in_force) > MAX_CERTIFICATES:
                raise EnrolmentError(
                    f"site {printable(site.name)!r} has {MAX_CERTIFICATES} certificates in force; renew later",
                    kind="too-many",
                )
            pem = issue(site.common_name)
            made = self._keep(session, site, pem, tls_key)
            audit.record(self._registry.folder, "renewed", site.name, serial=made.serial)
        return pem

    def _count(self, code: Code) -> None:
        code.tries += 1
        if code.tries == MAX_TRIES and not code.ended:
            code.ended = "tries"
            audit.record(
                self._registry.folder,
                "code-dead",
                code.site.name,
                code=code.id,
                reason="too many tries",
            )

    def _admitted(
        self, session: Session, code: Code, keys: Keys, admit: Callable[[str, str], bytes]
    ) -> Admitted:
        site, now = code.site, self._registry.now()
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
        ceased = site.cease("rotated")
        rejoined, site.state, site.joined = site.joined > 0, "member", now
        certificate = self._keep(session, site, pem, keys.tls)
        session.add(NodeKey(key=keys.node, site_id=site.id))
        code.used, code.tls_key, code.node_key = now, keys.tls, keys.node
        code.serial = certificate.serial
        audit.record(
            self._registry.folder,
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
        tls = _newest_of(session, keys.tls)
        if tls is not None:
            raise _key_in_use(tls.ceased)

    def _keep(self, session: Session, site: Site, pem: bytes, tls_key: str) -> Certificate:
        certificate = pki.read_certificate(pem)
        row = Certificate(
            serial=pki.serial(certificate),
            site_id=site.id,
            pem=pem.decode("ascii"),
            tls_key=tls_key,
            made=self._registry.now(),
            ends=certificate.not_valid_after_utc.timestamp(),
        )
        session.add(row)
        return row


def _newest_of(session: Session, tls_key: str) -> Certificate | None:
    """The newest certificate of a key."""
    wanted = select(Certificate).where(Certificate.tls_key == tls_key)
    return session.scalar(wanted.order_by(Certificate.made.desc()).limit(1))


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
