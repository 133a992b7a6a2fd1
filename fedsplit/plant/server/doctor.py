"""What `fedsplit doctor` looks at on a server: its folder, its services, and its port as a site sees it."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

from fedsplit import __version__
from fedsplit.core.errors import EncoderError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.plant import checks, paths
from fedsplit.plant.checks import Check, Look
from fedsplit.plant.server import nginx
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.runs import present
from fedsplit.plant.wire import Hello

SERVICES = ("superlink", "superexec", "encoder", "control")
_TIMEOUT_S = 5.0
_SILENT_S = 120.0


def server_checks(path: Path) -> Iterable[Check]:
    """All checks of the federation folder at `path`. Raises ConfigError for a folder whose settings cannot be read."""
    folder = FederationFolder.at(path)
    settings = folder.settings
    own = settings.proxy.mode == "own"
    names = SERVICES if own else (*SERVICES, "nginx")
    start = f"fedsplit server up {folder.path}"
    looks: dict[str, Look] = {
        "settings": lambda: Check("settings", "green", f"format 1, host {settings.server.host}, port {settings.server.port}"),
        "disk": lambda: checks.disk(folder.path),
        "memory": checks.memory,
        "processor": checks.processor,
        "clock": checks.clock,
        "secrets": lambda: checks.private(_secrets(folder)),
        "ca": lambda: checks.certificate(
            "ca", folder.ca, folder.ca_key, folder.ca, cure="restore ca/ from the backup; without it every site joins anew"
        ),
        "certificate": lambda: checks.certificate(
            "certificate", folder.certificate, folder.certificate_key,
            None if settings.tls.certificate else folder.ca, cure=f"it is renewed at the start: {start}",
        ),
        "host": lambda: _host(settings.server.host),
        "proxy": lambda: _own_proxy() if own else _nginx(folder),
        "backbone": lambda: _backbone(folder),
        "services": lambda: checks.services(folder.state, names, start=start, logs=folder.logs),
        "port": lambda: _port(folder),
        "encoder-answers": lambda: _encoder(folder),
        "sites": lambda: _sites(folder),
    }  # fmt: skip
    return checks.look_at(looks)


def _secrets(folder: FederationFolder) -> list[Path]:
    return [
        folder.ca_key,
        folder.loopback_certificate_key,
        folder.encoder_secret,
        folder.superexec_secret,
        folder.proxy_secret,
    ]


def _host(host: str) -> Check:
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
    except OSError as err:
        return Check(
            "host", "yellow", f"{host} has no address here: {err.strerror or err}",
            "enter it into the plant's DNS, or into /etc/hosts of server and sites",
        )  # fmt: skip
    return Check("host", "green", f"{host} is {', '.join(found)}")


def _nginx(folder: FederationFolder) -> Check:
    found = nginx.find(folder.settings.proxy.nginx)
    return Check("proxy", "green", f"{found.program}, version {'.'.join(map(str, found.version))}")


def _own_proxy() -> Check:
    return Check("proxy", "green", "a proxy of your own stands in front ([proxy] mode = own)")


def _backbone(folder: FederationFolder) -> Check:
    from fedsplit.model.backbone import Backbone

    found = Backbone.find(folder.settings.backbone.path)
    return Check(
        "backbone", "green", f"{found.name}, {found.blocks} blocks, digest {found.sha256[:12]}"
    )


def _port(folder: FederationFolder) -> Check:
    """Ask the public port as a site does: by its name, believing the federation's CA."""
    if (down := _down(folder)) is not None:
        return Check("port", "yellow", down, "start the server, then look again")
    server = folder.settings.server
    context = ssl.create_default_context(
        cafile=None if folder.settings.tls.certificate else str(folder.ca)
    )
    host = "127.0.0.1" if server.bind in ("", "0.0.0.0", "::") else server.bind
    url = f"https://{f'[{host}]' if ':' in host else host}:{server.port}{paths.HELLO}"
    named = {"sni_hostname": server.host}
    try:
        with httpx.Client(verify=context, timeout=_TIMEOUT_S, trust_env=False) as client:
            answer = client.get(url, headers={"host": server.host}, extensions=named)
        hello = Hello.model_validate_json(answer.content[: 64 << 10])
    except httpx.HTTPError as err:
        return Check(
            "port", "red", f"port {server.port} does not answer as {server.host}: {printable(err, limit=300)}",
            "look at nginx's line above, and whether another program has the port (ss -ltnp)",
        )  # fmt: skip
    except ValueError:
        return Check(
            "port", "red", f"port {server.port} answers {answer.status_code}, and not as fedsplit's control service does",
            "another program has the port, or the control service is down: see its line above",
        )  # fmt: skip
    if hello.fedsplit_version != __version__:
        return Check(
            "port", "red", f"fedsplit {hello.fedsplit_version} answers, {__version__} is installed",
            "restart the server after an upgrade",
        )  # fmt: skip
    return Check("port", "green", f"port {server.port} answers as {server.host}")


def _encoder(folder: FederationFolder) -> Check:
    """Ask the encoder itself, on loopback, as the ServerApp does."""
    from fedsplit.model.backbone import Backbone
    from fedsplit.transport import tokens
    from fedsplit.transport.client import capabilities
    from fedsplit.transport.keys import read_key

    if (down := _down(folder)) is not None:
        return Check("encoder-answers", "yellow", down, "start the server, then look again")
    address = f"127.0.0.1:{present(folder).port('encoder')}"
    began = time.monotonic()
    try:
        offered = capabilities(
            address,
            tokens.sign_publisher("doctor", read_key(folder.encoder_secret), 60.0),
            timeout_s=_TIMEOUT_S,
        )
    except EncoderError as err:
        return Check(
            "encoder-answers",
            "red",
            printable(err, limit=500),
            f"look into {folder.logs / 'encoder.jsonl'}",
        )
    backbone = Backbone.find(folder.settings.backbone.path)
    if offered.backbone_sha256 != backbone.sha256:
        return Check(
            "encoder-answers", "red",
            f"it hosts {offered.backbone_sha256[:12]}, federation.toml's backbone is {backbone.sha256[:12]}: "
            f"{backbone.differs(offered.backbone_sha256)}",
            "restart the server, so that it hosts what the folder names",
        )  # fmt: skip
    return Check(
        "encoder-answers",
        "green",
        f"in {1000 * (time.monotonic() - began):.0f} ms, with the folder's backbone",
    )


def _sites(folder: FederationFolder) -> Iterator[Check]:
    """The members: who is silent, whose certificate ends."""
    with Registry(folder) as registry:
        rows = registry.sites()
    members = [row for row in rows if row.state == "member"]
    yield Check("sites", "green", f"{len(members)} members, {len(rows) - len(members)} others")
    now = time.time()
    for row in members:
        name = printable(row.name, limit=60)
        if row.certificate_ends < now:
            yield Check(
                f"site {name}",
                "red",
                "its certificate is over",
                f"fedsplit federation rotate {name}, then join there with the code",
            )
        elif now - row.last_seen > _SILENT_S:
            ago = f"{(now - row.last_seen) / 60:,.0f} minutes ago" if row.last_seen else "never"
            yield Check(
                f"site {name}",
                "yellow",
                f"last heard of {ago}",
                "on its machine: fedsplit doctor SITE",
            )


def _down(folder: FederationFolder) -> str | None:
    try:
        present(folder)
    except FedsplitError as err:
        return str(err)
    return None
