"""The services of a server: their programs, ports, environment, and when each is ready.

superlink   Flower's SuperLink: TLS on loopback, sites known by keys, a database that outlives it
superexec   starts Flower's ServerApp process for a run
control     joining, renewing, backbone parts, status
encoder     the server's part of the backbone, in plain text on loopback, behind the proxy
nginx       the one public port; none where you run a proxy of your own

`chosen_ports` come first; `services` then writes what these programs read from flower/ and run/.
"""

from __future__ import annotations

import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from fedsplit.core.foreign import read_json
from fedsplit.core.programs import flower_variables, free_port, is_free, listening, program
from fedsplit.core.whole_files import write_whole
from fedsplit.plant.paths import HELLO
from fedsplit.plant.server import nginx
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_conf import Ports
from fedsplit.plant.server.runs import CONNECTION
from fedsplit.plant.service import Service

LOOPBACK_SERVICES = ("superlink", "encoder", "control")
_ASK_S = 2.0
_READY_S = {"encoder": 900.0}
"""A large backbone is read, and its digest taken, before the encoder listens ..."""
_OTHERS_READY_S = 180.0
"""... the others take seconds, or a minute on a small machine that has just started."""
_PYTHON = [sys.executable, "-m"]


def chosen_ports(folder: FederationFolder) -> dict[str, int]:
    """A free loopback port for each service, the one that it had where that is free still; nginx has the public one."""
    had = ports_before(folder)
    taken: set[int] = {folder.settings.server.port}
    found: dict[str, int] = {}
    for name in LOOPBACK_SERVICES:
        port = had.get(name, 0)
        while not port or port in taken or not is_free(port):
            port = free_port()
        taken.add(port)
        found[name] = port
    return found | {"nginx": folder.settings.server.port}


def ports_before(folder: FederationFolder) -> dict[str, int]:
    """The services' ports in state.json: those of now, or of the last time. Empty unless all are there."""
    try:
        found = read_json(folder.state, limit=1 << 20)["services"]
        ports = {name: found[name]["port"] for name in LOOPBACK_SERVICES}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not all(isinstance(port, int) and 1024 <= port <= 65535 for port in ports.values()):
        return {}
    return ports | {"nginx": folder.settings.server.port}


def keep_ports(folder: FederationFolder, ports: Mapping[str, int]) -> None:
    """Have the next `server up` take these ports, for what was told of them."""
    down = {"pid": None, "state": "down", "restarts": 0, "last_exit": None}
    kept = {"pid": None, "services": {name: down | {"port": port} for name, port in ports.items()}}
    write_whole(folder.state, json.dumps(kept, indent=1) + "\n")


def write_connection(folder: FederationFolder, port: int) -> None:
    """Write the Flower connection with which runs are started here."""
    text = (
        "# Written by `fedsplit server up`.\n"
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\n'
        f"root-certificates = {json.dumps(str(folder.ca), ensure_ascii=False)}\n"
    )
    write_whole(folder.flower_home / "config.toml", text)


def services(folder: FederationFolder, ports: Mapping[str, int]) -> list[Service]:
    """All services in the order of their start. Raises ConfigError and FederationError where a program is missing."""
    env = flower_variables(folder.flower_home)
    superlink, encoder, control = (ports[name] for name in LOOPBACK_SERVICES)
    up: dict[str, tuple[list[str], Callable[[], bool] | None]] = {
        "superlink": (
            _superlink(folder, superlink, env),
            _answers(f"https://127.0.0.1:{superlink}/health", folder.ca),
        ),
        "superexec": (_superexec(folder, superlink, env), None),
        "control": (
            [*_PYTHON, "fedsplit.plant.server.control", str(folder.path), "--port", str(control)],
            _answers(f"http://127.0.0.1:{control}{HELLO}"),
        ),
        # Behind control, which says in revoked.json whom it must not let in.
        "encoder": (_encoder(folder, encoder), lambda: listening(encoder)),
    }
    write_connection(folder, superlink)
    if folder.settings.proxy.mode == "nginx":
        command = nginx.prepare(folder, Ports(superlink, encoder, control))
        bind = folder.settings.server.bind
        up["nginx"] = (command, lambda: listening(ports["nginx"], bind))
    return [
        Service(
            name,
            command,
            folder.logs / f"{name}.jsonl",
            env=env,
            ready=ready,
            ready_s=_READY_S.get(name, _OTHERS_READY_S),
            port=ports.get(name, 0),
            cwd=folder.path,
        )
        for name, (command, ready) in up.items()
    ]


def _superlink(folder: FederationFolder, port: int, env: Mapping[str, str]) -> list[str]:
    return [
        program("flower-superlink", env),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process", "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
        *("--database", str(folder.superlink_database)),
        *("--superexec-auth-secret-file", str(folder.superexec_secret)),
        *("--ssl-certfile", str(folder.loopback_certificate)),
        *("--ssl-keyfile", str(folder.loopback_certificate_key)),
        *("--ssl-ca-certfile", str(folder.ca)),
    ]


def _superexec(folder: FederationFolder, port: int, env: Mapping[str, str]) -> list[str]:
    return [
        program("flower-superexec", env),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
        *("--root-certificates", str(folder.ca)),
        *("--superexec-auth-secret-file", str(folder.superexec_secret)),
    ]


def _encoder(folder: FederationFolder, port: int) -> list[str]:
    return [
        *(*_PYTHON, "fedsplit.cli.main", "encoder", "serve"),
        *("--backbone", folder.settings.backbone.path),
        *("--bind", f"127.0.0.1:{port}"),
        *("--secret-file", str(folder.encoder_secret)),
        *("--proxy-secret-file", str(folder.proxy_secret)),
        *("--revoked-file", str(folder.revoked)),
        *("--stats-file", str(folder.encoder_stats)),
        *("--registry", str(folder.modules)),
    ]


def _answers(url: str, ca: Path | None = None) -> Callable[[], bool]:
    """Whether a service answers there at all: what it says of a request does not matter."""

    def asked() -> bool:
        # A new context each time: the certificate may be renewed. Without proxies, for it is loopback.
        context = ssl.create_default_context(cafile=str(ca)) if ca is not None else None
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if context is not None:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        try:
            with urllib.request.build_opener(*handlers).open(url, timeout=_ASK_S) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as err:
            return err.code < 500
        except (OSError, ValueError):
            return False

    return asked
