"""What goes wrong on the line to the server, in words for the site's own people: httpx's errors, TLS, refusals.

A refusal keeps the server's own words. What is only a matter of time is a ServerAwayError.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from fedsplit.core.errors import (
    ConfigError,
    NotMemberError,
    PlantError,
    ServerAwayError,
    ServerRefusalError,
)
from fedsplit.core.foreign import parse_json, printable
from fedsplit.plant.wire import Refusal

# What the service, and the proxy before it, call a site that only a new code brings back. A certificate that is foreign or
# not valid yet is not among them: there a person's slip at the server may be put right.
_PUT_OUT = ("revoked", "rotated", "not-member", "certificate-expired")
# OpenSSL's numbers of why a certificate is not believed.
_NOT_YET, _OVER = 9, 10
_OTHER_NAME = (62, 64)


def refuse(status: int, body: bytes, address: str) -> None:
    """Raise what an answer other than 2xx means."""
    if 200 <= status < 300:
        return
    try:
        told = Refusal.model_validate(parse_json(body)["error"])
    except (ValueError, KeyError, TypeError):
        # Not our service: the proxy's own page.
        if status in (502, 503, 504):
            raise ServerAwayError(
                f"the server at {address} is up and its control service is not (answer {status}); it comes back, or look "
                f"at `fedsplit doctor` there"
            ) from None
        if status == 400:
            raise ServerRefusalError(
                f"the server at {address} does not take this site's certificate (answer 400): it is over by the server's "
                f"clock, or another federation's; join again with a new code (on the server: fedsplit federation rotate)"
            ) from None
        raise ServerAwayError(
            f"{address} answers {status} and not as a fedsplit server does; check address and port"
        ) from None
    message = printable(told.message, limit=2000)
    if status in (502, 503, 504, 429):
        raise ServerAwayError(message)
    if told.kind in _PUT_OUT:
        raise NotMemberError(message)
    raise ServerRefusalError(message)


@contextmanager
def translated(address: str) -> Iterator[None]:
    """What httpx and ssl raise, as words of ours."""
    try:
        yield
    except httpx.HTTPError as err:
        raise away(err, address) from err
    except httpx.InvalidURL as err:
        raise ConfigError(f"{printable(address)} is no address: HOST:PORT is wanted") from err


def away(err: httpx.HTTPError, address: str) -> PlantError:
    """What httpx raised, as an error of ours: where its cause is a certificate, trying again makes no sense."""
    causes = list(_causes(err))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ServerAwayError(_not_believed(cause, address))
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return ServerAwayError(
            f"the server at {address} and this site come to no TLS connection ({printable(err, limit=200)}); check that "
            f"the port is the federation's, and that no proxy stands between"
        )
    if isinstance(err, httpx.ProxyError):
        return ServerAwayError(
            f"the proxy of the environment does not lead to {address} ({printable(err, limit=200)}); put the server's "
            f"host into no_proxy, or have the proxy let it through"
        )
    if isinstance(err, httpx.TimeoutException):
        return ServerAwayError(
            f"the server at {address} does not answer in time; check address, port and firewall"
        )
    return ServerAwayError(
        f"nobody answers at {address} ({printable(err, limit=200)}); check the address, that the server is up "
        f"(on the server: fedsplit doctor) and the firewall"
    )


def _causes(err: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or err.__context__


def _not_believed(err: ssl.SSLCertVerificationError, address: str) -> str:
    if err.verify_code in _OTHER_NAME:
        return (
            f"the certificate of the server at {address} is for another name ({printable(err.verify_message)}); dial it by "
            f"the name that it was made for, or make one for this name (on the server: host in federation.toml)"
        )
    if err.verify_code in (_NOT_YET, _OVER):
        word = "not valid yet" if err.verify_code == _NOT_YET else "over"
        return (
            f"the certificate of the server at {address} is {word} by this machine's clock; set the clock (e.g. "
            f"timedatectl set-ntp true), or restart the server, which renews it"
        )
    return (
        f"the certificate of the server at {address} is not this federation's ({printable(err.verify_message)}): another "
        f"server, or something between that reads along; check the address, or join again with a new code"
    )
