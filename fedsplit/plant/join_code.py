"""A join code: all that a site needs to find its server, to know it again, and to be let in, on one line of text.

    FSJ1  <base 32: length of the address, address, SHA-256 of the CA's certificate, id, secret, CRC-32>

Capital letters and digits, without I, L, O and U (Crockford's base 32): it can be read aloud, and it survives e-mail,
which folds lines, quotes them and changes capitals. What is wrong with one is told apart: no code at all, a code of
another version, cut off, mistyped. The checksum finds slips; what protects a code are its secret, its one use and its
short life (`plant/server/registry.py`).
"""

from __future__ import annotations

import base64
import re
import secrets
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Self

from fedsplit.core.errors import ConfigError

KIND = "FSJ"
VERSION = "1"
ID_BYTES = 4
SECRET_BYTES = 16
_DIGEST_BYTES = 32
_CHECK_BYTES = 4
_FIXED_BYTES = 1 + _DIGEST_BYTES + ID_BYTES + SECRET_BYTES + _CHECK_BYTES
MAX_ADDRESS_BYTES = 255
MAX_TEXT_CHARS = 4096
"""Of what is looked at: a code has at most 511 characters, and a mail puts blanks and marks between them."""

_HEX = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
"""The 32 digits of Python's `int` and of base 32 hex."""
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_WRITE = str.maketrans(_HEX, _CROCKFORD)
# What is easily mistaken reads as what it was; a U never was one.
_READ = str.maketrans(_CROCKFORD + "ILOU", _HEX + "110?")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([1-9][0-9]{0,4})")
_AGAIN = "copy the whole line that `fedsplit federation add-site` printed"


@dataclass(frozen=True)
class JoinCode:
    """`address` HOST:PORT, `ca_fingerprint` SHA-256 in lower hex, `id` and `secret` in lower hex."""

    address: str
    ca_fingerprint: str
    id: str
    secret: str

    def __post_init__(self) -> None:
        checked_address(self.address)
        for name, size in (
            ("ca_fingerprint", _DIGEST_BYTES),
            ("id", ID_BYTES),
            ("secret", SECRET_BYTES),
        ):
            if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", getattr(self, name)):
                raise ConfigError(f"a join code's {name} has {2 * size} hex digits")

    def __repr__(self) -> str:
        # A log must not let anyone in.
        return f"JoinCode(address={self.address!r}, id={self.id!r})"

    @classmethod
    def new(cls, address: str, ca_fingerprint: str) -> Self:
        """A code with an id and a secret that nobody has seen."""
        secret = secrets.token_hex(SECRET_BYTES)
        return cls(address, ca_fingerprint, secrets.token_hex(ID_BYTES), secret)

    def text(self) -> str:
        """The line. `parse` reads it back."""
        address = self.address.encode("ascii")
        body = bytes([len(address)]) + address
        body += bytes.fromhex(self.ca_fingerprint + self.id + self.secret)
        body += _check(body)
        digits = base64.b32hexencode(body).decode("ascii").rstrip("=").translate(_WRITE)
        return KIND + VERSION + digits

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a line as a person pasted it. Raises ConfigError; the message never holds the code."""
        digits = _digits(text)
        try:
            bits = int(digits.translate(_READ) or "0", 32)
        except ValueError as err:
            raise ConfigError(f"the join code is mistyped; {_AGAIN}") from err
        size, spare = divmod(5 * len(digits), 8)
        body = (bits >> spare).to_bytes(size, "big")
        if len(body) < 1 + _CHECK_BYTES or _check(body[:-_CHECK_BYTES]) != body[-_CHECK_BYTES:]:
            raise ConfigError(_damage(body, len(digits)))
        length, rest = body[0], body[1:-_CHECK_BYTES]
        if len(body) != _FIXED_BYTES + length:
            raise ConfigError(f"the join code is mistyped; {_AGAIN}")
        found = rest[length:].hex()
        ends = (2 * _DIGEST_BYTES, 2 * (_DIGEST_BYTES + ID_BYTES))
        return cls(
            rest[:length].decode("ascii", "replace"),
            found[: ends[0]],
            found[ends[0] : ends[1]],
            found[ends[1] :],
        )


def checked_address(text: str) -> str:
    """`text` itself where it is HOST:PORT. Raises ConfigError."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found[2]) > 65535 or len(text) > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"{text[:100]!r} is not an address; HOST:PORT is wanted, with a name or a number for HOST"
        )
    return text


def _digits(text: str) -> str:
    """What stands behind kind and version, without what a mail put in between. Raises ConfigError."""
    # Full width letters come from Japanese keyboards, soft hyphens and marks of width from mail programs.
    raw = unicodedata.normalize("NFKC", text[:MAX_TEXT_CHARS]).upper()
    plain = "".join(c for c in raw if c.isalnum())
    if not plain:
        raise ConfigError(f"the join code is empty; {_AGAIN}")
    if not plain.startswith(KIND):
        raise ConfigError(f"this is not a join code, which begins with {KIND}{VERSION}; {_AGAIN}")
    found = plain[len(KIND) : len(KIND) + 1].translate(_READ)
    if found and found != VERSION:
        raise ConfigError(
            f"the join code is of version {found!r}, this fedsplit reads version {VERSION}; "
            "install the server's version of fedsplit here"
        )
    return plain[len(KIND) + 1 :]


def _damage(body: bytes, count: int) -> str:
    """Why the sum is wrong: characters are missing, or are too many, or are others."""
    wanted = -(-8 * (_FIXED_BYTES + body[0]) // 5) if body else 8 * _FIXED_BYTES // 5
    if count < wanted:
        return (
            f"the join code is too short: it has {count + 4} of {wanted + 4} characters; {_AGAIN}"
        )
    if count > wanted:
        return f"the join code is too long: it has {count + 4} characters, {wanted + 4} are wanted; {_AGAIN}"
    return f"the join code is mistyped (its checksum is wrong); {_AGAIN}"


def _check(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECK_BYTES, "big")
