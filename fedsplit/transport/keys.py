"""The file with the key that signs tokens, shared by the ServerApp and an encoder of its own."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.transport.tokens import check_key


def read_key(path: Path) -> bytes:
    """The signing key in a file, white space around it dropped. Raises ConfigError."""
    try:
        key = path.expanduser().read_bytes().strip()
    except OSError as err:
        raise ConfigError(
            f"secret file {path} cannot be read ({err.strerror}); make one with "
            f"`fedsplit encoder serve --new-secret --secret-file {path} ...`"
        ) from err
    check_key(key)
    return key


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
