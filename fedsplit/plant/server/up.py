"""A server from start to end: what is checked first, its services under a supervisor, what is seen to every hour; and its end.

`server_of` refuses a folder whose server is up already before anything else is looked at. Used by `fedsplit server`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from fedsplit.core.errors import FedsplitError, ServiceError
from fedsplit.core.processes import ProcessTree, runs
from fedsplit.plant.lock import taken, up_pid
from fedsplit.plant.server.certificate import check_own_certificate, renew_certificate
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx import OLDEST
from fedsplit.plant.server.nginx_conf import Ports, render
from fedsplit.plant.server.preflight import check_owner, check_public_port, check_secrets
from fedsplit.plant.server.runs import old_runs
from fedsplit.plant.server.services import (
    LOOPBACK_SERVICES,
    chosen_ports,
    keep_ports,
    ports_before,
    services,
)
from fedsplit.plant.service import Service
from fedsplit.plant.supervisor import Supervisor
from fedsplit.transport.keys import read_proxy_secret

CHORE_S = 3600.0
_END_S = 15.0
"""A supervisor ends within 10 s. What takes longer is ended from here."""
Say = Callable[[str], None]


def server_of(folder: FederationFolder, say: Say) -> Supervisor:
    """The supervisor of a folder's services, all that can be known before checked. Nothing has started yet.

    Raises ServiceError when the server is up already, and ConfigError, FederationError and OSError for what is wrong.
    """
    server = folder.settings.server

    def checked() -> Sequence[Service]:
        check_owner(folder, say)
        check_secrets(folder, say)
        renew_certificate(folder, say)
        check_own_certificate(folder, say)
        if folder.settings.proxy.mode == "nginx":
            check_public_port(server.bind, server.port)
        return services(folder, chosen_ports(folder))

    return Supervisor(
        checked,
        state_file=folder.state,
        say=say,
        about={"host": server.host, "port": server.port},
        log_mb=folder.settings.retention.log_mb,
    )


def planned(folder: FederationFolder, say: Say) -> list[Service]:
    """The services as `server up` would start them, for another service manager. Raises as `server_of`.

    The ports are those of the last time, where they are free or the folder's server has them now.
    """
    check_secrets(folder, say)
    up = up_pid(folder.state) is not None
    ports = ports_before(folder) if up else chosen_ports(folder)
    found = services(folder, ports)
    if not up:
        with taken(folder.state):
            keep_ports(folder, ports)
    return found


def sample_of_nginx(folder: FederationFolder) -> str:
    """nginx.conf as it is, or would be: what a proxy of your own has to do."""
    ports = ports_before(folder) or chosen_ports(folder)
    secret = read_proxy_secret(folder.proxy_secret).decode()
    loopback = Ports(*(ports[name] for name in LOOPBACK_SERVICES))
    return render(folder, loopback, secret=secret, version=OLDEST)


class Chores:
    """What a server that is left alone for years has to see to. Called every hour; says what it did, and what failed."""

    def __init__(self, folder: FederationFolder, server: Supervisor, say: Say) -> None:
        self._folder, self._server, self._say = folder, server, say
        self._shown = _stamp(folder.certificate)

    def __call__(self) -> None:
        """See to the certificate and to old runs."""
        self._see_to_certificate()
        try:
            for path in old_runs(self._folder, now=time.time()):
                shutil.rmtree(path)
                self._say(f"the run {path.name} is gone: [retention] keeps the newest runs alone")
        except OSError as err:
            self._say(f"an old run cannot be removed: {err}")

    def _see_to_certificate(self) -> None:
        """Renew the server's certificate in time, and have a new one read."""
        try:
            if renew_certificate(self._folder, self._say):
                # It reads its certificate at its start; sites do not notice a few seconds without it.
                self._server.restart("superlink")
            if (stamp := _stamp(self._folder.certificate)) != self._shown:
                check_own_certificate(self._folder, self._say)
                self._read_again()
                self._shown = stamp
        except (FedsplitError, OSError) as err:
            self._say(f"the server's certificate cannot be renewed: {err}")

    def _read_again(self) -> None:
        """Have nginx read its certificate again; streams that are open go on."""
        nginx = self._server.state()["services"].get("nginx")
        if nginx is None:
            self._say(f"{self._folder.certificate} is new: have your proxy read it again")
        elif nginx["pid"] and hasattr(signal, "SIGHUP"):
            with contextlib.suppress(OSError):
                os.kill(nginx["pid"], signal.SIGHUP)
        else:
            self._server.restart("nginx")


def _stamp(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def end_server(folder: FederationFolder) -> int | None:
    """End the server that is up in a folder, and wait for it; its process id. None where none is up.

    Raises ServiceError when it does not end, or may not be ended by this user.
    """
    if (pid := up_pid(folder.state)) is None:
        return None
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        tree = ProcessTree()
        tree.adopt(pid)
        tree.refresh()
        try:
            process.terminate()
        except psutil.AccessDenied as err:
            raise ServiceError(
                f"process {pid} belongs to {process.username()}: end the server as that user, or as root"
            ) from err
        deadline = time.monotonic() + _END_S
        while runs(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left := tree.end(grace_s=2.0):
            raise ServiceError(f"processes {left} do not end; look at them with `ps`")
    return pid
