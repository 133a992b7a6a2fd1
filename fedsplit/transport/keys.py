"""Secret files: the key that signs tokens, shared by the ServerApp and an encoder of its own, and the proxy's secret."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.transport.tokens import MIN_KEY_BYTES, check_key

_MAX_BYTES = 1024
_MAKE = "`python -c 'import secrets; print(secrets.token_hex(32))'`"


def read_key(path: Path) -> bytes:
    """The signing key in a file, white space around it dropped. Raises ConfigError."""
    key = _read(path, f"`fedsplit encoder serve --new-secret --secret-file {path} ...`")
    check_key(key)
    return key


def read_proxy_secret(path: Path) -> bytes:
    """The secret that a proxy shows its services. Raises ConfigError where it would not stand in a header, or is weak."""
    secret = _read(path, _MAKE)
    if not re.fullmatch(rb"[0-9A-Za-z_-]{%d,%d}" % (MIN_KEY_BYTES, _MAX_BYTES), secret):
        raise ConfigError(
            f"the proxy's secret file {path} holds {len(secret)} bytes; {MIN_KEY_BYTES} to {_MAX_BYTES} letters, digits, "
            f"'-' and '_' are wanted: make one with {_MAKE}"
        )
    return secret


def _read(path: Path, how_made: str) -> bytes:
    try:
        return path.expanduser().read_bytes().strip()
    except OSError as err:
        raise ConfigError(
            f"secret file {path} cannot be read ({err.strerror}); make one with {how_made}"
        ) from err


def write_new_key(path: Path) -> None:
    """Write a fresh key that only its owner may read. Raises ConfigError when the file is already there."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The mode is a no-op on Windows, where the folder's own rights count.
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as err:
        raise ConfigError(f"secret file {path} cannot be made ({err.strerror})") from err
    with os.fdopen(number, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32) + "\n")
