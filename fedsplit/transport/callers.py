"""Who is behind a call: the name that a certificate proved, bound to the token, and not revoked.

Three set-ups. Behind a proxy the proxy's headers tell the name, and the ServerApp calls past the proxy, from this machine.
With client certificates gRPC tells it. With neither there is the token alone. Asked by servicer.py for every call.
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple
from urllib.parse import unquote

from cryptography import x509

from fedsplit.core.errors import RefusedError
from fedsplit.core.foreign import printable
from fedsplit.core.names import certificate_name
from fedsplit.core.proxied import Proxied, bare_serial, proxied
from fedsplit.transport.revocation import Revoked
from fedsplit.transport.tokens import SiteToken

REVOKED = (
    "this site's access was revoked; to take part again it joins with a new code from the operator"
)


class Caller(NamedTuple):
    """By what a caller is known: names and serial numbers of certificates."""

    names: frozenset[str]
    serials: frozenset[str]


class Callers:
    """Checks callers whose token is good."""

    def __init__(
        self, *, certificates: bool = False, proxy_secret: bytes = b"", revoked: Revoked
    ) -> None:
        """`certificates`: gRPC has verified the clients' own. With `proxy_secret` a site is who the proxy says it is."""
        self._certificates = certificates
        self._secret = proxy_secret
        self._revoked = revoked

    def site(self, context: Any, token: SiteToken) -> Caller:
        """The site that calls with `token`. Raises RefusedError where the token is another one's."""
        site = token.grant.site
        wanted = certificate_name(site)
        if self._secret:
            seen = self._proxied(context)
            if seen is None:
                raise RefusedError(
                    f"the token of site {site!r} came past the proxy: sites dial the federation's public address"
                )
            _check_name(site, {wanted}, [seen.site])
            return Caller(frozenset((wanted,)), frozenset((seen.serial,)))
        caller = self._by_certificate(context)
        if self._certificates:
            _check_name(site, {wanted, site}, caller.names)
        return Caller(caller.names | {wanted}, caller.serials)

    def publisher(self, context: Any) -> Caller:
        """The ServerApp. Raises RefusedError where it comes through the proxy, or from another machine behind one."""
        if self._secret and (self._proxied(context) is not None or not _is_local(context.peer())):
            raise RefusedError(
                "a publisher's call came from outside: the ServerApp dials the encoder itself, on its machine"
            )
        return self._by_certificate(context)

    def is_revoked(self, caller: Caller) -> bool:
        """Asked again and again while a stream lives."""
        return self._revoked.covers(caller.names, caller.serials)

    def _proxied(self, context: Any) -> Proxied | None:
        texts = [(k, v) for k, v in context.invocation_metadata() if isinstance(v, str)]
        try:
            return proxied(texts, self._secret)
        except ValueError as error:
            raise RefusedError(str(error)) from error

    def _by_certificate(self, context: Any) -> Caller:
        if not self._certificates:
            return Caller(frozenset(), frozenset())
        names = {name.decode(errors="replace") for name in context.peer_identities() or ()}
        chain = context.auth_context().get("x509_pem_cert", ())
        serials = {f"{x509.load_pem_x509_certificate(pem).serial_number:X}" for pem in chain}
        return Caller(frozenset(names), frozenset(map(bare_serial, serials)))


def _check_name(site: str, wanted: set[str], shown: Any) -> None:
    """Raise RefusedError with both names unless a name that the certificate shows is one of the token's site."""
    if wanted.isdisjoint(shown):
        names = ", ".join(repr(printable(name, limit=128)) for name in sorted(shown) if name)
        as_well = "" if wanted == {site} else f" (in certificates {certificate_name(site)!r})"
        raise RefusedError(
            f"the token is for site {site!r}{as_well}, the certificate for {names or 'nobody'}: a site uses its own "
            "certificate with the token that the run gave it"
        )


def _is_local(peer: str) -> bool:
    """gRPC's name of a peer: is it on this machine?"""
    kind, _, rest = peer.partition(":")
    if kind == "unix":
        return True
    try:
        address = ipaddress.ip_address(unquote(rest).rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
