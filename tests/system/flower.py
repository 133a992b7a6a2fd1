"""Starts real Flower processes on loopback for the system tests, and ends every one of them by its id."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit.core.processes import ProcessTree
from fedsplit.core.programs import flower_environment, free_port
from fedsplit.core.records import SUMMARY_MARK, Summary

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CONNECTION = "deployment"


def toml_value(value: Any) -> str:
    return json.dumps(value)


@dataclass(frozen=True)
class Deployment:
    """A SuperLink with its SuperNodes, in the order of their node configs."""

    env: dict[str, str]
    supernodes: list[subprocess.Popen[bytes]]
    start_supernode: Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def deployment(home: Path, nodes: list[Mapping[str, Any]]) -> Iterator[Deployment]:
    """A SuperLink and a SuperNode for each node config, with the environment for `flwr`."""
    home.mkdir(parents=True, exist_ok=True)
    env = flower_environment(home)
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    tree = ProcessTree()
    started = []
    with contextlib.ExitStack() as files:

        def start(name: str, *args: str) -> subprocess.Popen[bytes]:
            log = files.enter_context((home / f"{name}.log").open("wb"))
            process = subprocess.Popen(
                [str(BIN / args[0]), *args[1:]], env=env, stdout=log, stderr=log, cwd=home
            )
            started.append(process)
            tree.adopt(process.pid)
            return process

        supernodes: list[subprocess.Popen[bytes]] = []

        def start_supernode(node: Mapping[str, Any]) -> None:
            node = {"state-dir": str(home / "sites"), **node}
            config = " ".join(f"{k}={toml_value(v)}" for k, v in node.items())
            process = start(
                f"supernode-{len(supernodes)}", "flower-supernode", "--insecure",
                "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()),
                "--node-config", config,
            )  # fmt: skip
            supernodes.append(process)

        try:
            start(
                "superlink",
                "flower-superlink",
                "--insecure",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            )
            wait_for_http(port)
            for node in nodes:
                start_supernode(node)
            yield Deployment(env, supernodes, start_supernode)
        finally:
            tree.end()
            for process in started:
                process.wait(timeout=20)


def wait_until(true: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s:g} s")
        time.sleep(0.05)


def wait_for_http(port: int, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
        ):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no SuperLink at port {port} within {timeout_s:g} s")


def flwr_run(
    env: Mapping[str, str], runs: Path, settings: Mapping[str, Any], *, timeout_s: float
) -> tuple[Summary, str]:
    """`flwr run` of this checkout; waits for the run's summary. Returns it and the run's log."""
    name = str(settings["run-name"])
    flat = {"runs-dir": str(runs), **settings}
    config = runs / f"{name}.toml"
    runs.mkdir(parents=True, exist_ok=True)
    config.write_text("".join(f"{k} = {toml_value(v)}\n" for k, v in flat.items()))
    done = subprocess.run(
        [str(BIN / "flwr"), "run", str(ROOT), CONNECTION, "--run-config", str(config), "--format", "json"],
        env=dict(env), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run_id = json.loads(done.stdout[done.stdout.index("{") :])["run-id"]
    end = time.monotonic() + timeout_s
    summary = runs / name / "summary.json"
    while time.monotonic() < end:
        if summary.exists() and SUMMARY_MARK in (log := flwr_log(env, run_id)):
            return Summary.model_validate_json(summary.read_text()), log
        time.sleep(0.5)
    raise TimeoutError(f"no summary within {timeout_s:g} s:\n{flwr_log(env, run_id)[-4000:]}")


def flwr_log(env: Mapping[str, str], run_id: str) -> str:
    return subprocess.run(
        [str(BIN / "flwr"), "log", run_id, CONNECTION, "--show"],
        env=dict(env), capture_output=True, text=True, timeout=60, check=False,
    ).stdout  # fmt: skip


def fedsplit(
    *args: str, timeout_s: float = 280.0, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    return subprocess.run(
        [str(BIN / "fedsplit"), *args],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=None if env is None else dict(env),
        check=False,
    )
