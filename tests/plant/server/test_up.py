"""A whole server, started and ended as a person does it, with the real SuperLink, encoder, control service and nginx."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.core.processes import runs
from fedsplit.core.programs import free_port, listening
from fedsplit.federation.control import FlowerControl
from fedsplit.plant import pki
from fedsplit.plant.paths import HELLO
from fedsplit.plant.server import up as module
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import Wanted, make_folder, server_certificate
from fedsplit.plant.server.services import chosen_ports, keep_ports, ports_before
from fedsplit.plant.server.up import Chores, end_server, planned, sample_of_nginx, server_of

COMMAND = [sys.executable, "-m", "fedsplit.cli.main", "server"]
nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="there is no nginx",
)


@pytest.fixture
def plant(tmp_path: Path) -> FederationFolder:
    return make_folder(tmp_path / "plant", Wanted(host="127.0.0.1", port=free_port()))


@pytest.fixture
def up(plant: FederationFolder, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The server as a process, up; killed afterwards if it is still there."""
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*COMMAND, "up", str(plant.path), "--json"],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
    with process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready.get("address") == f"127.0.0.1:{plant.settings.server.port}", ready
        yield process
        process.kill()


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False
    )


def state(plant: FederationFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plant.state.read_text())
    return found


def alive(pid: int) -> bool:
    try:
        return runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


@nginx
@pytest.mark.slow
def test_a_server_is_up_mends_itself_and_ends(
    plant: FederationFolder, up: subprocess.Popen[str]
) -> None:
    services = state(plant)["services"]
    assert {one["state"] for one in services.values()} == {"up"}
    assert list(services) == ["superlink", "superexec", "control", "encoder", "nginx"]
    port = services["superlink"]["port"]

    # A second one is told of the first, and does it no harm.
    second = call("up", str(plant.path), "--json")
    assert second.returncode == 1
    assert f"process {up.pid} keeps them" in json.loads(second.stdout)["error"]["message"]

    # SIGKILL for the SuperLink: the same port and the same nodes again.
    _, key = pki.new_node_key()
    address = f"127.0.0.1:{port}"
    with FlowerControl(address, plant.ca) as flower:
        flower.register(key)
        before = len(flower.nodes())
    os.kill(services["superlink"]["pid"], signal.SIGKILL)
    end = time.monotonic() + 60
    while (link := state(plant)["services"]["superlink"])["restarts"] == 0 or link["state"] != "up":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert "SIGKILL" in link["last_exit"]["why"]
    assert link["port"] == port
    with FlowerControl(address, plant.ca) as flower:
        assert len(flower.nodes()) == before == 1
    hello = httpx.get(
        f"https://127.0.0.1:{plant.settings.server.port}{HELLO}",
        verify=ssl.create_default_context(cafile=plant.ca),
        trust_env=False,
    )
    assert hello.json()["fedsplit_version"]

    pids = [one["pid"] for one in state(plant)["services"].values()]
    began = time.monotonic()
    ended = call("down", str(plant.path), "--json")
    assert time.monotonic() - began < 14  # The command's own start counts here.
    assert json.loads(ended.stdout) == {"folder": str(plant.path), "ended": True, "pid": up.pid}
    assert up.wait(5) == 0
    assert not any(map(alive, pids))
    assert not any(map(listening, ports_before(plant).values()))
    assert call("down", str(plant.path)).returncode == 1


def test_ports_are_kept_where_they_are_free(plant: FederationFolder) -> None:
    first = chosen_ports(plant)
    assert len(set(first.values())) == 4
    keep_ports(plant, first)
    assert chosen_ports(plant) == first == ports_before(plant)
    plant.state.write_text('{"services": {"encoder": {"port": "x"}}}')
    assert set(chosen_ports(plant)) == set(first)
    assert ports_before(plant) == {}


@nginx
def test_each_services_command_can_be_printed(plant: FederationFolder) -> None:
    found = {s.name: s for s in planned(plant, print)}
    assert "--enable-supernode-auth" in found["superlink"].command
    assert found["superlink"].env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert "127.0.0.1" in found["superlink"].env["no_proxy"]
    # The next `up` has the ports that were printed.
    assert ports_before(plant)["encoder"] == found["encoder"].port
    again = {s.name: s.command for s in planned(plant, print)}
    assert again == {name: service.command for name, service in found.items()}
    assert f"127.0.0.1:{found['control'].port}" in sample_of_nginx(plant)


def test_with_a_proxy_of_ones_own_there_is_no_nginx(tmp_path: Path) -> None:
    plant = make_folder(tmp_path / "plant", Wanted(host="h", proxy="own"))
    assert [s.name for s in planned(plant, print)] == [
        "superlink",
        "superexec",
        "control",
        "encoder",
    ]
    assert "listen" in sample_of_nginx(plant)


def test_a_server_that_cannot_start_gives_the_folder_free(
    plant: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.encoder_secret.unlink()
    with pytest.raises(ConfigError, match=r"lacks secrets/encoder.secret"):
        server_of(plant, print)
    assert end_server(plant) is None


def test_a_folder_whose_server_says_no_number(
    plant: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_END_S", 0.3)
    with module.taken(plant.state), pytest.raises(ServiceError, match="held by a process that"):
        end_server(plant)


class _Server:
    """What the chores do to a supervisor."""

    def __init__(self, pid: int) -> None:
        self.pid, self.restarted = pid, list[str]()

    def restart(self, name: str) -> None:
        self.restarted.append(name)

    def state(self) -> dict[str, Any]:
        return {"services": {"nginx": {"pid": self.pid}}}


def test_a_new_certificate_is_read_by_those_who_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_folder(tmp_path / "plant", Wanted(host="server.example"))
    hung_up: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: hung_up.append((pid, number)))
    server, told = _Server(4711), list[str]()
    chores = Chores(plant, server, told.append)  # type: ignore[arg-type]
    chores()
    assert (server.restarted, hung_up, told) == ([], [], [])
    ca = pki.Pair.read(plant.ca, plant.ca_key)
    other, key = server_certificate(ca, "old.example", days=300)
    plant.loopback_certificate.write_bytes(other)
    plant.loopback_certificate_key.write_bytes(key)
    chores()
    assert server.restarted == ["superlink"]
    assert hung_up == [(4711, signal.SIGHUP)]
    plant.loopback_certificate.write_bytes(b"none")
    plant.runs.rmdir()
    chores()
    assert "cannot be renewed" in told[-2]
    assert "an old run cannot be removed" in told[-1]
