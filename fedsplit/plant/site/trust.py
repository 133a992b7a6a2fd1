"""Is this the server that a join code names, and can a site work with it? Known before a code is used up.

Nothing is believed of what an address shows until its CA's fingerprint is the code's; from then on that CA alone is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedsplit import __version__
from fedsplit.core.errors import ConfigError, ServerAwayError
from fedsplit.core.foreign import printable
from fedsplit.plant import pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.site.calls import ControlCalls, look
from fedsplit.plant.site.keys import day
from fedsplit.plant.wire import Hello

AHEAD_S, BEHIND_S = 5.0, 305.0
"""How far a site's clock may be from the server's: beyond that Flower refuses the site."""


def believed(code: JoinCode, say: Callable[[str], None]) -> str:
    """Look at the server that the code names, believe its CA, and give that (PEM). Raises ConfigError, ServerAwayError."""
    found = look(code.address)
    hello = found.hello
    ca = next((c for c in found.certificates if pki.fingerprint(c) == code.ca_fingerprint), None)
    if ca is None:
        shown = ", ".join(pki.fingerprint(c)[:12] for c in found.certificates) or "none"
        raise ServerAwayError(
            f"the server at {code.address} is not the one that gave this code: the code names the CA "
            f"{code.ca_fingerprint[:12]}, the server shows {shown}. Nothing secret was sent. Check the address, or ask for a "
            f"new code (on the server: fedsplit federation add-site)"
        )
    pem = ca.public_bytes(serialization.Encoding.PEM).decode("ascii")
    check_clock(hello)
    if hello.fedsplit_version != __version__:
        raise ConfigError(
            f"the server has fedsplit {printable(hello.fedsplit_version, limit=40)}, this machine has {__version__}; both "
            f"have to be the same: install {printable(hello.fedsplit_version, limit=40)} here, or upgrade the server. The code "
            f"is not used up"
        )
    _named(found.certificates[0], code.address)
    with ControlCalls(code.address, pem) as calls:
        calls.hello()
    say(f"Server: {code.address}, fedsplit {hello.fedsplit_version}, the CA that the code names")
    return pem


def check_clock(hello: Hello) -> None:
    """Raise ConfigError where this machine's clock is further from the server's than Flower takes."""
    if fault := clock_fault(hello.server_time):
        raise ConfigError(fault)


def clock_fault(server_time: float) -> str:
    """The same in words; empty where the clock is right."""
    ahead = time.time() - server_time
    if -BEHIND_S <= ahead <= AHEAD_S:
        return ""
    word = "ahead of" if ahead > 0 else "behind"
    return (
        f"this machine's clock is {abs(ahead):,.0f} s {word} the server's (here {day(time.time())}, there "
        f"{day(server_time)}); at most {AHEAD_S:g} s ahead or {BEHIND_S:g} s behind is taken. Set it, e.g. timedatectl "
        f"set-ntp true"
    )


def _named(certificate: x509.Certificate, address: str) -> None:
    """Raise ServerAwayError where the server's certificate is for other names than the address has."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = [str(name.value) for name in names]
    except (
        ValueError,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        return  # nobody has looked at this certificate yet; TLS itself says what is wrong
    if host.lower() not in {name.lower() for name in known} and not any("*" in n for n in known):
        raise ServerAwayError(
            f"the certificate of the server at {address} is for {printable(', '.join(known), limit=200)}, not for {host}; "
            f"dial it by one of those names (a new code names it), or put this one into its federation.toml"
        )
