"""What is looked at before a server starts: who may read its secrets, and whether the public port can be had.

Each fault is a ConfigError that says what to do, and nothing has been started then. certificate.py and nginx.py look at
theirs, `doctor` at more.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable

import psutil

from fedsplit.core.errors import ConfigError
from fedsplit.plant.server import nginx
from fedsplit.plant.server.certificate import check_own_certificate
from fedsplit.plant.server.folder import FederationFolder

Say = Callable[[str], None]


def outlook(folder: FederationFolder) -> list[str]:
    """What will keep a new folder's server from starting on this machine, as things are now."""
    found: list[str] = []
    server, proxy = folder.settings.server, folder.settings.proxy
    checks: list[Callable[[], object]] = [lambda: check_own_certificate(folder, found.append)]
    if proxy.mode == "nginx":
        checks.append(lambda: check_public_port(server.bind, server.port))
        checks.append(lambda: nginx.find(proxy.nginx))
    for check in checks:
        try:
            check()
        except ConfigError as err:
            found.append(str(err))
    return found


def check_owner(folder: FederationFolder, say: Say) -> None:
    """Tell root that the folder is another user's: what the server writes now, that user cannot write later."""
    if os.name == "nt" or os.geteuid() != 0 or (owner := folder.path.stat().st_uid) == 0:
        return
    import pwd

    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    say(
        f"{folder.path} belongs to {name}, and this is root: files that are made now will be root's, and a server of "
        f"{name} will not be able to write them. Better: `sudo -u {name} fedsplit server up {folder.path}`"
    )


def check_secrets(folder: FederationFolder, say: Say) -> None:
    """See that the secrets are there and are their owner's alone; mends rights that are too wide, and says so."""
    secrets = [folder.ca_key, folder.loopback_certificate_key, folder.encoder_secret]
    secrets += [folder.superexec_secret, folder.proxy_secret, folder.page_password]
    missing = [str(p.relative_to(folder.path)) for p in secrets if not p.is_file()]
    if missing:
        raise ConfigError(
            f"{folder.path} lacks {', '.join(missing)}; restore it from the backup of the folder"
        )
    for path in secrets:
        if os.name == "nt" or not (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            continue
        try:
            path.chmod(0o600)
        except OSError as err:
            raise ConfigError(
                f"{path} can be read by others on this machine (mode {mode:o}), and that cannot be changed from here "
                f"({err.strerror}); its owner must do `chmod 600 {path}`"
            ) from err
        say(
            f"{path.relative_to(folder.path)} could be read by others on this machine (mode {mode:o}); now its owner "
            "alone may. If someone may have read it, make a new federation folder"
        )


def check_public_port(host: str, port: int) -> None:
    """See that the port can be listened on. `host` is the address, "" for all. Raises ConfigError, which says who has it."""
    family, address = _listens(host)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name != "nt":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except OSError as err:
        raise ConfigError(_port_fault(err, host, port)) from err


def _listens(host: str) -> tuple[socket.AddressFamily, str]:
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            return socket.AF_INET6, host
    return socket.AF_INET, host


def _port_fault(err: OSError, host: str, port: int) -> str:
    at = f"port {port}" + (f" of {host}" if host else "")
    if err.errno == errno.EADDRINUSE:
        return (
            f"{at} is in use{_listener(port)}; end that, or choose another `port` in the table [server] of federation.toml "
            "(sites that have joined dial the old one: they must join again)"
        )
    if err.errno == errno.EACCES:
        return (
            f"{at} is below 1024, and this user may not listen there. Do one of these: choose a port from 1024 on in the "
            "table [server] of federation.toml; have root run `fedsplit server install`, which gives the service that right; "
            f"allow it to every program: `sysctl net.ipv4.ip_unprivileged_port_start={port}`; or allow it to nginx: "
            "`setcap cap_net_bind_service=+ep /usr/sbin/nginx`"
        )
    return (
        f"{at} cannot be listened on: {err.strerror or err}; `bind` in the table [server] of federation.toml must be an "
        "address of this machine, or empty"
    )


def _listener(port: int) -> str:
    """Who listens there, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections(kind="tcp"):
            if (
                one.status == psutil.CONN_LISTEN
                and one.laddr
                and one.laddr.port == port
                and one.pid
            ):
                return f" by {psutil.Process(one.pid).name()} (process {one.pid})"
    return ""
