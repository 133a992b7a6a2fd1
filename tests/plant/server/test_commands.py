"""`fedsplit server` with bad input: each a clear text, an exit code, nothing half-made."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.cli import server
from fedsplit.cli.main import call
from fedsplit.core.programs import free_port
from fedsplit.plant import install
from fedsplit.plant.server import nginx
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import Wanted, make_folder

PORT = free_port()
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A `fedsplit server` command: its exit code, stdout and stderr."""

    def called(*words: object) -> tuple[int, str, str]:
        code = call(["server", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return called


@pytest.fixture
def plant(tmp_path: Path) -> FederationFolder:
    return make_folder(tmp_path / "plant", Wanted(host="127.0.0.1", port=PORT))


def test_init_says_what_comes_next(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("init", tmp_path / "my plant", "--host", "h", "--port", PORT)
    assert code == 0
    assert f"fedsplit server up '{tmp_path}/my plant'" in out
    assert "Keep a copy" in out
    code, out, _ = run("init", tmp_path / "other", "--host", "h", "--json")
    assert json.loads(out) == {"folder": str(tmp_path / "other"), "host": "h", "port": 8443}


def test_init_twice(run: Run, plant: FederationFolder) -> None:
    code, out, _ = run("init", plant.path, "--host", "h", "--json")
    assert code == 2
    assert "is a federation folder already" in json.loads(out)["error"]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "a b"], "is no host name"),
        (["--host", "h", "--port", "70000"], "port"),
        (["--host", "h", "--backbone", "no-such-model"], "no-such-model"),
        (["--host", "h", "--certificate", "a.pem"], "--certificate-key go together"),
        (["--host", "h", "--ca", "a.pem"], "--ca-key go together"),
        ([], "--host"),
    ],
)
def test_init_with_what_cannot_be_used(
    run: Run, tmp_path: Path, words: list[str], said: str
) -> None:
    code, _, err = run("init", tmp_path / "plant", *words)
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_init_tells_what_will_keep_the_server_from_starting(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(nginx, "_PLACES", "")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("init", tmp_path / "plant", "--host", "h", "--port", port)
    assert code == 0
    assert f"note: port {port} is in use" in err
    assert "note: there is no nginx" in err


def test_up_without_nginx_or_with_one_that_is_too_old(
    run: Run, plant: FederationFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nginx, "_PLACES", "")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    code, _, err = run("up", plant.path)
    assert code == 2
    assert "there is no nginx" in err
    assert 'mode = "own"' in err
    old = tmp_path / "nginx"
    old.write_text("#!/bin/sh\necho 'nginx version: nginx/1.14.2' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}:/bin:/usr/bin")
    code, _, err = run("up", plant.path)
    assert code == 2
    assert "1.14.2, which is too old: 1.18.0 or newer is wanted" in err
    assert json.loads(run("down", plant.path, "--json")[1])["ended"] is False


def test_up_where_the_port_is_taken(run: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        plant = make_folder(tmp_path / "plant", Wanted(host="h", port=port, bind="127.0.0.1"))
        code, out, _ = run("up", plant.path, "--json")
    assert code == 2
    assert "is in use by " in json.loads(out)["error"]["message"]
    assert not plant.nginx_conf.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            (f"port = {PORT}", "port = 0\nprot = 1"),
            ["server.port = 0", "server.prot: no such setting"],
        ),
        (("format = 1", "format = 0"), ["an older fedsplit made this"]),
        (("format = 1", "format = 7"), ["a newer fedsplit made this"]),
        (("[server]", "[server"), ["is not TOML"]),
    ],
)
@pytest.mark.parametrize("command", ["up", "down", "services", "install"])
def test_settings_that_are_damaged_or_of_another_version(
    run: Run, plant: FederationFolder, command: str, change: tuple[str, str], said: list[str]
) -> None:
    file = plant.path / "federation.toml"
    file.write_text(file.read_text("utf-8").replace(*change), "utf-8")
    code, _, err = run(command, plant.path)
    assert code == 2
    assert all(words in err for words in said)


@pytest.mark.parametrize("command", ["up", "down", "services", "install", "nginx-conf"])
def test_what_is_no_federation_folder(run: Run, tmp_path: Path, command: str) -> None:
    code, _, err = run(command, tmp_path)
    assert code == 2
    assert "is no federation folder" in err
    assert list(tmp_path.iterdir()) == []


def test_down_where_nothing_is_up(run: Run, plant: FederationFolder) -> None:
    code, out, _ = run("down", plant.path)
    assert code == 1
    assert "no server is up in" in out


def test_install_without_systemd_writes_the_unit_and_says_what_to_do(
    run: Run, plant: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "has_systemd", lambda: False)
    code, out, _ = run("install", plant.path)
    assert code == 1
    assert f"fedsplit server up {plant.path}" in out
    unit = (plant.path / "deploy" / "fedsplit-server.service").read_text("utf-8")
    assert f"WorkingDirectory={plant.path}" in unit
    code, out, _ = run("uninstall", "--json")
    assert (code, json.loads(out)["removed"]) == (1, False)


def test_install_hands_on_what_the_service_needs(
    run: Run, plant: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def installed(kind: str, folder: Path, **more: object) -> str:
        del more["say"]
        asked.append((kind, folder, more))
        return "fedsplit-server.service"

    monkeypatch.setattr(install, "has_systemd", lambda: True)
    monkeypatch.setattr(install, "install", installed)
    code, out, _ = run("install", plant.path, "--json")
    assert (code, json.loads(out)["installed"]) == (0, True)
    assert asked == [
        ("server", plant.path, {"reads": [], "port": PORT, "name": server.UNIT}),
    ]


def test_services_prints_commands_that_a_shell_can_run(run: Run, tmp_path: Path) -> None:
    plant = make_folder(tmp_path / "plant", Wanted(host="h", proxy="own"))
    code, out, _ = run("services", plant.path)
    assert code == 0
    assert "export FLWR_TELEMETRY_ENABLED=0" in out
    assert "# superlink\n" in out
    code, out, _ = run("services", plant.path, "--json")
    found = json.loads(out)
    assert [s["name"] for s in found["services"]] == [
        "superlink",
        "superexec",
        "control",
        "encoder",
    ]
    assert found["environment"]["FLWR_HOME"] == str(plant.flower_home)
    code, out, _ = run("nginx-conf", plant.path)
    assert "listen 0.0.0.0:8443" in out
