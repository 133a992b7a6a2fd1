"""Keys at a real SuperLink over TLS: Flower's private names fit the installed version."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsplit.core.errors import EnrolmentError, FederationError
from fedsplit.core.programs import flower_environment, free_port, program
from fedsplit.federation.control import FlowerControl
from fedsplit.plant import pki


def superlink(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A SuperLink that asks for keys, with a certificate of a new CA in `folder`."""
    env = flower_environment(folder)
    if not (folder / "ca.pem").exists():
        ca, key = pki.make_ca("test", days=1), pki.new_key()
        (folder / "ca.pem").write_bytes(ca.pem)
        (folder / "key.pem").write_bytes(pki.key_pem(key))
        hosts = ("localhost", "127.0.0.1")
        made = pki.issue(
            ca, key.public_key(), common_name="localhost", hosts=hosts, days=1, client=False
        )
        (folder / "cert.pem").write_bytes(made)
    files = [f"--ssl-{k}={folder / v}" for k, v in (("certfile", "cert.pem"), ("keyfile", "key.pem"), ("ca-certfile", "ca.pem"))]  # fmt: skip
    with (folder / "superlink.log").open("ab") as log:
        return subprocess.Popen(
            [program("flower-superlink", env), *files, "--enable-supernode-auth", "--isolation", "process",
             "--host", "127.0.0.1", "--port", str(port), "--database", str(folder / "superlink.db")],
            env=env, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip


def wait_for(control: FlowerControl, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            control.nodes()
            return
        except FederationError:
            time.sleep(0.2)
    raise TimeoutError("no SuperLink")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerControl]:
    folder = tmp_path_factory.mktemp("superlink")
    port = free_port()
    process = superlink(folder, port)
    try:
        with FlowerControl(f"127.0.0.1:{port}", folder / "ca.pem") as found:
            wait_for(found, process)
            yield found
    finally:
        process.terminate()
        process.wait(20)


def key() -> str:
    return pki.new_node_key()[1]


@pytest.mark.slow
def test_a_key_is_let_in_once_and_taken_away_for_good(control: FlowerControl) -> None:
    mine, other = key(), key()
    control.register(mine, "検査")
    control.register(mine, "検査")
    control.register(other)
    mine_there = [n for n in control.nodes() if n.public_key == mine]
    assert [(n.status, n.gone) for n in mine_there] == [("registered", False)]
    assert abs(mine_there[0].registered - time.time()) < 60
    assert control.unregister(mine)
    assert not control.unregister(mine)
    with pytest.raises(EnrolmentError, match="make new keys"):
        control.register(mine)
    gone = {n.public_key: n.gone for n in control.nodes()}
    assert gone[mine]
    assert not gone[other]


@pytest.mark.slow
def test_a_key_takes_tenths_of_a_second_not_seconds(control: FlowerControl) -> None:
    began = time.monotonic()
    for _ in range(5):
        control.register(key())
    assert time.monotonic() - began < 5


def test_a_superlink_that_is_down_is_said(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(pki.make_ca("test", days=1).pem)
    with (
        FlowerControl(f"127.0.0.1:{free_port()}", tmp_path / "ca.pem") as control,
        pytest.raises(FederationError, match="does not answer"),
    ):
        control.nodes()
    with pytest.raises(FederationError, match="cannot be read"):
        FlowerControl("127.0.0.1:1", tmp_path / "none.pem")
