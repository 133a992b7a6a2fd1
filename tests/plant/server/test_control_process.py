"""The control service as a process, with a real SuperLink: keys follow the registry through stops and a lost database."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import httpx
import pytest

from fedsplit.cli.main import call
from fedsplit.core.programs import free_port
from fedsplit.federation.control import FlowerControl
from fedsplit.plant import paths, pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.lock import taken
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry
from tests.federation.test_control import superlink
from tests.plant.server.conftest import CA
from tests.plant.server.test_control import NewSite, error_of, join, proxy


class Server:
    """A SuperLink and a control service of a folder, and its state.json."""

    def __init__(self, folder: FederationFolder, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.ports = {"superlink": free_port(), "control": free_port()}
        stack.callback(taken(folder.state).release)
        services = {name: {"port": port} for name, port in self.ports.items()}
        folder.state.write_text(json.dumps({"pid": os.getpid(), "services": services}))
        self.flower_home = folder.path / "flower"
        self.flower_home.mkdir()
        key = pki.new_key()
        made = pki.issue(
            CA, key.public_key(), common_name="localhost", hosts=["127.0.0.1"], days=1, client=False
        )
        for name, data in (("ca.pem", CA.pem), ("key.pem", pki.key_pem(key)), ("cert.pem", made)):
            (self.flower_home / name).write_bytes(data)
        address = f"127.0.0.1:{self.ports['superlink']}"
        self.keys = stack.enter_context(FlowerControl(address, folder.ca))

    def start_superlink(self) -> subprocess.Popen[bytes]:
        process = superlink(self.flower_home, self.ports["superlink"])
        self._stack.callback(killed, process)
        return process

    def start_control(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedsplit.plant.server.control", str(self._folder.path)]
        process = subprocess.Popen([*command, "--port", str(self.ports["control"])])
        self._stack.callback(stopped, process)
        return process

    def alive(self) -> set[str]:
        return {node.public_key for node in self.keys.nodes() if not node.gone}


def stopped(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    return process.wait(10)


def killed(process: subprocess.Popen[bytes]) -> None:
    """Flower's SuperLink may take its time to stop."""
    process.kill()
    process.wait(10)


def until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while True:
        try:
            if true():
                return
        except Exception:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.2)


@pytest.mark.slow
def test_keys_follow_the_registry_through_stops_and_a_lost_database(
    folder: FederationFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = NewSite(), NewSite()
    with ExitStack() as stack:
        server = Server(folder, stack)
        registry = stack.enter_context(Registry(folder))
        url = f"http://127.0.0.1:{server.ports['control']}"
        client = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=30))
        control = server.start_control()
        until(lambda: client.get(paths.HELLO).status_code == 200)
        # The SuperLink is not up as yet: the code stays good.
        code = registry.add_site("line-1", 24)
        # Its backbone is read first, which takes a while on a busy machine.
        kinds = [(503, "backbone")]

        def asked() -> bool:
            kinds.append(error_of(client.post(paths.JOIN, json=one.request(code))))
            return kinds[-1] != kinds[0]

        until(asked, 150)
        assert kinds[-1] == (503, "superlink")
        link = server.start_superlink()
        until(lambda: server.alive() == set())
        made = join(client, code, one)
        assert made.backbone_sha256
        headers = proxy(made.certificate, "line-1")
        assert client.get(paths.AUTHORISE, headers=headers).status_code == 204
        join(client, JoinCode.parse(registry.add_site("line-2", 24).text()), two)
        assert server.alive() == {one.node_key, two.node_key}
        # Revoked from the command line: at once, everywhere.
        args = ["federation", "revoke", "line-1", "--federation", str(folder.path), "--json"]
        assert call(args) == 0
        assert json.loads(capsys.readouterr().out)["flower_told"] is True
        assert server.alive() == {two.node_key}
        assert error_of(client.get(paths.AUTHORISE, headers=headers)) == (403, "revoked")
        # The SuperLink loses its database.
        killed(link)
        for path in server.flower_home.glob("superlink.db*"):
            path.unlink()
        # uvicorn ends in good order, and then by the signal.
        assert stopped(control) in (0, -signal.SIGTERM)
        server.start_superlink()
        server.start_control()
        until(lambda: server.alive() == {two.node_key})
