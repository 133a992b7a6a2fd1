"""A real Flower deployment on loopback for a benchmark: a SuperLink, some SuperNodes, a private home.

All of it ends with the `with`: every process is known by its id (fedsplit/cli/processes.py), also those that Flower detaches
(flower-superexec, flwr-serverapp, flwr-clientapp). Used by stream_vs_messages.py.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedsplit.cli.flower import FlowerCommands
from fedsplit.core.errors import FederationError
from fedsplit.core.processes import ProcessTree
from fedsplit.core.programs import flower_environment, free_port

_CONNECTION = "bench"
_START_S = 120.0


@dataclass(frozen=True)
class Deployment:
    """What runs, and Flower's commands against it."""

    home: Path
    commands: FlowerCommands
    tree: ProcessTree


@contextmanager
def deployment(nodes: int) -> Iterator[Deployment]:
    """SuperLink and SuperNodes while inside. Raises FederationError when the SuperLink does not start."""
    home = Path(tempfile.mkdtemp(prefix="fedsplit-flower-"))
    env = flower_environment(home)
    tree = ProcessTree()
    try:
        port = free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        link.append("--disable-runtime-dependency-installation")
        _start(link, env, home, tree)
        _wait_healthy(port, home)
        for _ in range(nodes):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            _start([*node, "--port", str(free_port())], env, home, tree)
        yield Deployment(home, FlowerCommands(_CONNECTION, env), tree)
    finally:
        left = tree.end()
        shutil.rmtree(home, ignore_errors=True)
        if left:
            raise FederationError(f"processes of Flower would not end: {left}")


def _start(command: list[str], env: dict[str, str], home: Path, tree: ProcessTree) -> None:
    program = shutil.which(command[0], path=env["PATH"])
    if program is None:
        raise FederationError(f"{command[0]} is not installed beside this Python")
    with (home / f"{command[0]}.log").open("ab") as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            env=env,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    tree.adopt(process.pid)


def _wait_healthy(port: int, home: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    log = (home / "flower-superlink.log").read_text(encoding="utf-8", errors="replace")
    raise FederationError(f"the SuperLink did not start within {_START_S:g} s:\n{log[-2000:]}")
