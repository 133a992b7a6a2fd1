"""Programs that fedsplit starts: where they are, the environment of Flower's, and a free port to listen on.

Flower is only ever called as a program from here: nothing of it is imported.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from fedsplit.core.errors import FederationError

_PORTS = range(20_000, 32_768)
_PORT_TRIES = 100


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """The whole environment Flower runs in: this process's, and `flower_variables`."""
    return os.environ | flower_variables(home)


def flower_variables(home: Path | None = None) -> dict[str, str]:
    """What Flower is told: nothing phones home, nothing is installed, loopback has no proxy. `home` is its folder."""
    found = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Flower's commands print pictures, which a terminal of Latin-1 cannot show. We read UTF-8.
        "PYTHONIOENCODING": "utf-8",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    for key in ("NO_PROXY", "no_proxy"):
        given = os.environ.get(key, "")
        found[key] = ",".join(filter(None, [given, "127.0.0.1", "localhost", "::1"]))
    if home is not None:
        found["FLWR_HOME"] = str(home)
    return found


def program(name: str, env: Mapping[str, str]) -> str:
    """The path of one of Flower's programs. Raises FederationError where it is not installed."""
    path = shutil.which(name, path=env["PATH"])
    if path is None:
        raise FederationError(
            f"the program {name!r} was not found beside {sys.executable} or on PATH; "
            'install it with: pip install "fedsplit[simulation]"'
        )
    return path


def free_port() -> int:
    """A free TCP port of loopback, for a program that has to be told its port.

    Below the ports that systems hand out (from 32768 on Linux, 49152 elsewhere): one of those may be another
    program's by the time that ours binds it.
    """
    for _ in range(_PORT_TRIES):
        port = secrets.choice(_PORTS)
        if is_free(port):
            return port
    raise FederationError(f"no free port on 127.0.0.1 in {_PORT_TRIES} tries")


def is_free(port: int) -> bool:
    """May a TCP port of loopback be listened on now?"""
    with socket.socket() as probe, contextlib.suppress(OSError):
        if os.name != "nt":
            # Connections that have ended keep no server from its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def listening(port: int, host: str = "") -> bool:
    """Does somebody listen at a port of this machine? `host` is the address, "" for all of them."""
    here = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    with contextlib.suppress(OSError), socket.create_connection((here, port), timeout=1.0):
        return True
    return False
