"""A whole plant on this machine, by the commands that people type: a server, sites, a run, a newcomer, a revocation, the end.

What else people do is in the manual, which tests/docs/test_manual.py follows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None,
        reason="no nginx here",
    ),
]
COMMAND = [sys.executable, "-m", "fedsplit.cli.main"]
PICTURES = 36


def call(*args: str, rc: int = 0, timeout_s: float = 240) -> dict[str, Any]:
    """`fedsplit ARGS --json`."""
    done = subprocess.run(
        [*COMMAND, *args, "--json"], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == rc, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return dict(json.loads(done.stdout))


def wait_for(true: Callable[[], object], *, what: str, timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.2)


@dataclass
class Plant:
    """A server and its sites, each a program of its own."""

    path: Path
    server: subprocess.Popen[bytes] | None = None
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path / "plant"

    def start(self, name: str, *args: str) -> subprocess.Popen[bytes]:
        with (self.path / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*COMMAND, *args], stdout=log, stderr=log, start_new_session=True
            )

    def join(self, name: str) -> dict[str, Any]:
        code = call("federation", "add-site", name, "--federation", str(self.folder))["code"]
        data = f"folder:{self.path / 'data' / name}"
        return call(
            "site",
            "join",
            code,
            "--dir",
            str(self.path / name),
            "--data",
            data,
            "--task",
            "inspection",
        )

    def run_site(self, name: str) -> None:
        self.sites[name] = self.start(name, "site", "run", str(self.path / name))

    def states(self) -> dict[str, str]:
        return {
            s["name"]: s["state"] for s in call("status", "--federation", str(self.folder))["sites"]
        }

    def log(self, name: str) -> str:
        return (self.path / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def left(self) -> list[str]:
        """Command lines of programs that were started here and still run."""
        found = []
        for process in psutil.process_iter():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if (
                str(self.path) in line
                and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(line)
        return found


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """A server that is up, and two sites that have joined and run."""
    made = Plant(tmp_path_factory.mktemp("p"))
    digits = load_digits()
    for number, name in enumerate(("line-a", "line-b", "line-c")):
        for i in range(number, 3 * PICTURES, 3):
            file = made.path / "data" / name / str(digits.target[i] % 3) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(file)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    try:
        call(
            "server",
            "init",
            str(made.folder),
            "--host",
            "localhost",
            "--port",
            port,
            "--bind",
            "127.0.0.1",
        )
        made.server = made.start("server", "server", "up", str(made.folder))
        state = made.folder / "run" / "state.json"
        wait_for(
            lambda: "the server is up" in made.log("server") or made.server.poll() is not None,
            what="server up",
        )
        assert made.server.poll() is None, made.log("server")
        assert set(json.loads(state.read_text())["services"]) == {
            "superlink",
            "superexec",
            "control",
            "encoder",
            "nginx",
        }
        for name in ("line-a", "line-b"):
            assert made.join(name)["site"] == name
            made.run_site(name)
        wait_for(lambda: set(made.states().values()) == {"idle"}, what="both sites idle")
        yield made
    finally:
        for process in [*made.sites.values(), *([made.server] if made.server else [])]:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in [*made.sites.values(), *([made.server] if made.server else [])]:
            process.wait(timeout=30)


def test_a_run_trains_at_the_sites_and_a_newcomer_joins_it(plant: Plant) -> None:
    settings = (
        "task=inspection",
        "cut=2,4",
        # So many that a site has time to join on a busy machine.
        "rounds=20",
        "batch-size=8",
        "deadline-s=120",
        "run-name=first",
    )
    run = subprocess.Popen(
        [*COMMAND, "run", "--federation", str(plant.folder), *(w for s in settings for w in ("--set", s)), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    status = plant.folder / "runs" / "first" / "status.json"
    wait_for(
        lambda: run.poll() is not None or (status.is_file() and '"training"' in status.read_text()),
        what="training",
    )
    plant.join("line-c")
    plant.run_site("line-c")
    out, err = run.communicate(timeout=500)
    assert run.returncode == 0, f"{out}\n{err}"
    summary = json.loads(out)
    assert summary["outcome"] == "complete"
    assert [s["name"] for s in summary["sites"]] == ["line-a", "line-b", "line-c"]
    # Loaded once, whatever the number of rounds.
    assert {s["backbone_loads"] for s in summary["sites"]} == {1}
    assert any("line-c joined in round" in note for note in summary["notes"])
    assert all(s["bytes_up"] > 0 for s in summary["sites"])
    told = call("status", "--federation", str(plant.folder))
    assert [(r["name"], r["phase"]) for r in told["ended"]] == [("first", "complete")]
    assert told["encoder"]["encoded"] > 0


def test_a_revoked_site_ends_and_says_why(plant: Plant) -> None:
    call("federation", "revoke", "line-b", "--federation", str(plant.folder))
    assert plant.sites.pop("line-b").wait(timeout=180) == 4
    assert "revoked" in plant.log("line-b")
    assert plant.states()["line-b"] == "refused"
    lines = [(line["what"], line["who"]) for line in audit.read(FederationFolder.at(plant.folder))]
    assert ("revoked", "line-b") in lines


def test_all_of_it_ends_within_ten_seconds_and_leaves_nothing(plant: Plant) -> None:
    began = time.monotonic()
    call("server", "down", str(plant.folder))
    assert time.monotonic() - began < 25  # the command's own start is among it
    assert plant.server is not None
    assert plant.server.wait(timeout=10) == 0
    for process in plant.sites.values():
        process.send_signal(signal.SIGTERM)
    for process in plant.sites.values():
        assert process.wait(timeout=15) in (0, 143, 130)
    plant.sites.clear()
    wait_for(lambda: not plant.left(), what=f"nothing left of {plant.path}", timeout_s=10)
    call("server", "down", str(plant.folder), rc=1)
