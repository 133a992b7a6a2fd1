"""What the control service does for a site: let it in, renew its certificate, hear how it is.

The keys are the site's own: it sends the public halves. Of a signing request only the key counts; the name in the
certificate is that of the join code. A join is made as a whole: where Flower does not take the node's key, the code is
as good as before.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization

from fedsplit.core.errors import EnrolmentError, FedsplitError
from fedsplit.core.throttle import Throttle
from fedsplit.plant import pki
from fedsplit.plant.server import audit
from fedsplit.plant.server.admission import Admission, Keys
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.node_keys import NodeKeys
from fedsplit.plant.server.registry import Registry, Shown
from fedsplit.plant.server.tables import Standing
from fedsplit.plant.server.trusted import public_ca
from fedsplit.plant.wire import (
    JoinAnswer,
    JoinRequest,
    RenewAnswer,
    RenewRequest,
    Report,
    ReportAnswer,
)

FEW = 30
"""Refused joins that are looked at in a row; after that one in a second, unless the code is one of ours."""


@dataclass(frozen=True)
class BackboneFacts:
    """What a site has to fetch."""

    name: str
    sha256: str


class Enrolment:
    """Joins, renewals and reports of one federation; safe in several threads."""

    def __init__(
        self,
        folder: FederationFolder,
        registry: Registry,
        node_keys: NodeKeys,
        backbone: Callable[[], BackboneFacts],
        modules: Callable[[str], dict[str, str] | None] = lambda _task: None,
    ) -> None:
        """`modules`: {task: digest} of the version in production for a task. Raises ConfigError and OSError where the CA cannot be read."""
        self._folder, self._registry = folder, registry
        self._admission = Admission(registry)
        self._node_keys, self._backbone, self._modules = node_keys, backbone, modules
        self._ca = pki.Pair.read(folder.ca, folder.ca_key)
        self._refusals = Allowance(FEW, every_s=1.0)
        self._told = Throttle(most=20, every_s=3600.0)

    def join(self, request: JoinRequest) -> JoinAnswer:
        """Redeem a code. Raises EnrolmentError, ConfigError for keys of another kind, FederationError without Flower."""
        if not self._refusals.any_left() and not self._admission.is_open(request.code_id):
            raise EnrolmentError(
                "too many joins were refused just now; try again in a minute", kind="too-many"
            )
        try:
            return self._joined(request)
        except FedsplitError as err:
            if isinstance(err, EnrolmentError):
                self._refusals.take()
            self._tell_refusal(request, err)
            raise

    def renew(self, serial: str, request: RenewRequest) -> RenewAnswer:
        """A new certificate for a member. Raises EnrolmentError, ConfigError."""
        key = pki.read_csr(request.csr.encode())
        pem = self._admission.renew(serial, _digest(key), lambda name: self._sign(key, name))
        return RenewAnswer(certificate=pem.decode("ascii"))

    def report(self, shown: Shown, report: Report) -> ReportAnswer:
        """Keep what a site says of itself, and say how it stands. Raises EnrolmentError for an unknown certificate."""
        if shown.standing == "not-member":
            raise refusal(shown)
        if shown.standing == "member":
            self._registry.seen(shown.name, report)
            found = self._modules(report.task)
            return ReportAnswer(standing="member", server_time=time.time(), modules=found)
        return ReportAnswer(
            standing=shown.standing, server_time=time.time(), message=str(refusal(shown))[:500]
        )

    def _joined(self, request: JoinRequest) -> JoinAnswer:
        key = pki.read_csr(request.csr.encode())
        node_key = pki.read_node_key(request.node_key)
        backbone = self._backbone()
        chain = public_ca(self._folder)

        def admit(name: str, common_name: str) -> bytes:
            self._node_keys.register(node_key, name)
            return self._sign(key, common_name)

        keys = Keys(tls=_digest(key), node=node_key)
        admitted = self._admission.redeem(request.code_id, request.secret, keys, admit)
        if admitted.ceased:
            # Where Flower is gone by now, the next comparison does it.
            self._node_keys.forget(admitted.ceased)
        return JoinAnswer(
            site=admitted.name,
            certificate=admitted.certificate.decode("ascii"),
            ca=chain[-1].public_bytes(serialization.Encoding.PEM).decode("ascii"),
            backbone=backbone.name,
            backbone_sha256=backbone.sha256,
            cut=str(self._folder.settings.run.get("cut", "")),
        )

    def _sign(self, key: pki.PublicKey, common_name: str) -> bytes:
        days = self._folder.settings.certificates.site_days
        return pki.issue(self._ca, key, common_name=common_name, days=days, client=True)

    def _tell_refusal(self, request: JoinRequest, err: FedsplitError) -> None:
        kind = err.kind if isinstance(err, EnrolmentError) else type(err).__name__
        left_out = self._told.left_out(kind)
        if left_out is not None:
            audit.record(
                self._folder,
                "join-refused",
                "unknown",
                code=request.code_id,
                kind=kind,
                reason=str(err),
                version=request.fedsplit_version,
                left_out=left_out,
            )


class Allowance:
    """So many at once, then one each `every_s`."""

    def __init__(
        self, most: int, *, every_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._every_s, self._now = most, every_s, now
        self._left, self._at = float(most), now()
        self._lock = threading.Lock()

    def any_left(self) -> bool:
        """May there be one more?"""
        with self._lock:
            return self._filled() >= 1

    def take(self) -> None:
        """There was one."""
        with self._lock:
            self._left = max(0.0, self._filled() - 1)

    def _filled(self) -> float:
        now = self._now()
        self._left = min(self._most, self._left + (now - self._at) / self._every_s)
        self._at = now
        return self._left


_WHY: dict[Standing, str] = {
    "revoked": "site {name!r} was revoked; if it shall be a member again, ask for a new join code (on the server: "
    "fedsplit federation add-site) and join with new keys",
    "rotated": "site {name!r} has joined again with new keys, and this certificate was replaced; is another machine "
    "running with the same site's folder? Stop this one, or join it under a name of its own",
    "not-member": "this federation does not know the certificate as one in force; join again with a new code (on the "
    "server: fedsplit federation rotate)",
}


def refusal(shown: Shown) -> EnrolmentError:
    """Why a certificate does not let its bearer in."""
    return EnrolmentError(_WHY[shown.standing].format(name=shown.name), kind=shown.standing)


def _digest(key: pki.PublicKey) -> str:
    """SHA-256 of a public key."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()
