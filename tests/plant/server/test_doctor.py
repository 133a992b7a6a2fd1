"""`fedsplit doctor` on a server: each planted fault is found and named with a cure."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from fedsplit.plant import checks, pki
from fedsplit.plant.checks import Check
from fedsplit.plant.lock import taken
from fedsplit.plant.server.admission import Admission, Keys
from fedsplit.plant.server.doctor import server_checks
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.init import Wanted, make_folder
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.wire import Report

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
    reason="no nginx here",
)


HELD: list[FileLock] = []


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[FederationFolder]:
    yield make_folder(tmp_path / "plant", Wanted(host="localhost", port=8443))
    while HELD:
        HELD.pop().release()


def found(folder: FederationFolder) -> dict[str, Check]:
    return {c.name: c for c in server_checks(folder.path)}


def change(folder: FederationFolder, old: str, new: str) -> None:
    file = folder.path / "federation.toml"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@needs_nginx
def test_a_new_folder_has_nothing_red_and_says_that_it_is_not_up(plant: FederationFolder) -> None:
    all_ = found(plant)
    # Whether NTP runs here is this machine's affair.
    assert {n: c.level for n, c in all_.items() if c.level != "green" and n != "clock"} == {
        "services": "yellow", "port": "yellow", "encoder-answers": "yellow",
    }  # fmt: skip
    assert "fedsplit server up" in all_["services"].do
    assert "6 blocks" in all_["backbone"].found


def _no_nginx(plant: FederationFolder) -> None:
    change(plant, 'nginx = ""', 'nginx = "/nowhere/nginx"')


def _no_backbone(plant: FederationFolder) -> None:
    change(plant, 'path = "vit-glyphs"', 'path = "/nowhere/vit"')


def _no_name(plant: FederationFolder) -> None:
    change(plant, 'host = "localhost"', 'host = "fl.invalid"')


def _another_ca_key(plant: FederationFolder) -> None:
    plant.ca_key.write_bytes(pki.key_pem(pki.new_key()))


def _certificate_over(plant: FederationFolder) -> None:
    ca = pki.Pair.read(plant.ca, plant.ca_key)
    key = pki.read_key(plant.certificate_key.read_bytes())
    made = pki.issue(ca, key.public_key(), common_name="localhost", days=-0.01, client=False)
    plant.certificate.write_bytes(made + ca.pem)


def _a_secret_is_lost(plant: FederationFolder) -> None:
    plant.encoder_secret.unlink()


def _others_may_read(plant: FederationFolder) -> None:
    plant.proxy_secret.chmod(0o640)


def _damaged_state(plant: FederationFolder) -> None:
    _hold(plant)
    plant.state.write_text('{"pid": 4711, "services": 1}', encoding="utf-8")


def _hold(plant: FederationFolder) -> None:
    """As a server that is up holds its folder."""
    HELD.append(taken(plant.state))


def _a_service_is_down(plant: FederationFolder) -> None:
    _hold(plant)
    one = {"pid": 1, "port": 9, "state": "up", "restarts": 0, "last_exit": None}
    services = dict.fromkeys(("superlink", "superexec", "control", "nginx"), one)
    services["encoder"] = one | {
        "state": "down",
        "restarts": 7,
        "last_exit": {"why": "ended by itself (signal SIGKILL)", "at": "now"},
    }
    plant.state.write_text(json.dumps({"pid": os.getpid(), "services": services}), encoding="utf-8")


def _a_site_is_over(plant: FederationFolder) -> None:
    ca = pki.Pair.read(plant.ca, plant.ca_key)

    def signed(_name: str, common_name: str) -> bytes:
        return pki.issue(
            ca, pki.new_key().public_key(), common_name=common_name, days=1, client=True
        )

    with Registry(plant, now=lambda: time.time() - 2 * 86400) as registry:
        code = registry.add_site("line-a", 24)
        Admission(registry).redeem(code.id, code.secret, Keys("0" * 64, "key"), signed)
        registry.seen("line-a", Report(state="idle"))


@pytest.mark.parametrize(
    ("fault", "name", "level", "said", "cure"),
    [
        (_no_nginx, "proxy", "red", "there is no nginx at /nowhere/nginx", ""),
        (_no_backbone, "backbone", "red", "/nowhere/vit", ""),
        (_no_name, "host", "yellow", "fl.invalid has no address here", "/etc/hosts"),
        (_another_ca_key, "ca", "red", "is not the key of", "backup"),
        (_certificate_over, "certificate", "red", "over since", "fedsplit server up"),
        (_a_secret_is_lost, "secrets", "red", "missing", "backup"),
        (_others_may_read, "secrets", "red", "others may read", "chmod 600"),
        (_damaged_state, "services", "red", "cannot be read", "fedsplit server up"),
        (_a_service_is_down, "encoder", "red", "signal SIGKILL", "encoder.jsonl"),
        (_a_site_is_over, "site line-a", "yellow", "last heard of 2,880 minutes ago", "fedsplit doctor SITE"),
    ],
)  # fmt: skip
def test_each_planted_fault_is_found(
    fault: Callable[[FederationFolder], None],
    name: str,
    level: str,
    said: str,
    cure: str,
    plant: FederationFolder,
) -> None:
    fault(plant)
    check = found(FederationFolder(plant.path))[name]
    assert check.level == level
    assert said in check.found
    assert cure in check.do


def test_another_program_at_the_port_is_told(plant: FederationFolder) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        change(plant, "port = 8443", f"port = {other.getsockname()[1]}")
        _a_service_is_down(plant)
        other.settimeout(0.1)
        check = found(FederationFolder(plant.path))["port"]
    assert check.level == "red"
    assert "does not answer as localhost" in check.found


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        ("echo yes", "green", "kept by NTP"),
        ("echo no", "yellow", "no NTP keeps it"),
        ("exit 1", "green", "who keeps it is not known here"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for the program")
def test_a_clock_that_nobody_keeps_is_told(
    said: str, level: str, words: str, tmp_path: Path
) -> None:
    program = tmp_path / "timedatectl"
    program.write_text(f"#!/bin/sh\n{said}\n", encoding="utf-8")
    program.chmod(0o700)
    found = checks.clock(str(program))
    assert (found.level, words in found.found) == (level, True)
    assert checks.clock("/nowhere/timedatectl").level == "green"
