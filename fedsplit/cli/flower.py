"""Starts and stops Flower for one run: a private SuperLink in simulation, and Flower's own commands.

`LocalSuperLink` owns a process tree and a folder and leaves neither behind, not even when this
process is killed outright (keeper.py). `FlowerCommands` is `flwr run | list | log | stop` with
typed answers. Flower is only ever called as a program: the CLI imports nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedsplit.cli.flower_words import in_words, superlink_of
from fedsplit.core.closing import Closing
from fedsplit.core.errors import FederationError
from fedsplit.core.foreign import parse_json
from fedsplit.core.keeper import DETACHED, kept
from fedsplit.core.processes import ProcessTree, held_signals, runs
from fedsplit.core.programs import flower_environment, free_port, program

CONNECTION = "fedsplit"
_START_TIMEOUT_S = 60.0
_RAY_SOCKET_BYTES = 72
"""What Ray adds to its folder for the path of a socket ..."""
_SOCKET_PATH_BYTES = 103
"""... and how long that may become."""
_CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class RunState:
    """What Flower says of a run: its status, e.g. `running` or `finished:failed`, and details."""

    status: str
    details: str

    @property
    def finished(self) -> bool:
        return self.status.startswith("finished")


class FlowerCommands:
    """Flower's commands against one SuperLink connection. Raises FederationError with Flower's words."""

    def __init__(self, connection: str, env: dict[str, str]) -> None:
        self.connection = connection
        self._env = env

    def start(self, app: Path, run_config: Path, federation_config: str = "") -> str:
        """Submit the app; returns Flower's id of the run."""
        args = ["run", str(app), self.connection, "--run-config", str(run_config)]
        if federation_config:
            args += ["--federation-config", federation_config]
        return str(self._json(*args, timeout_s=120)["run-id"])

    def state(self, run_id: str) -> RunState:
        """How the run stands."""
        answer = self._json("list", self.connection, "--run-id", run_id, timeout_s=30)
        runs = [r for r in answer["runs"] if str(r["run-id"]) == run_id]
        if not runs:
            raise FederationError(f"Flower does not know run {run_id} at {self.connection!r}")
        return RunState(str(runs[0]["status"]), str(runs[0]["status-details"]))

    def log(self, run_id: str) -> str:
        """What the run's processes have written so far; empty when Flower will not say."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._call("log", run_id, self.connection, "--show", timeout_s=30).stdout
        return ""

    def stream_log(self, run_id: str) -> subprocess.Popen[bytes]:
        """A process that writes the run's log to its stdout until the run ends: one connection, no polling.

        Close its `stdin` to end it.
        """
        command = [program("flwr", self._env), "log", run_id, self.connection, "--stream"]
        return kept(command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def stop(self, run_id: str) -> bool:
        """Ask Flower to stop the run; False when it would or could not."""
        with contextlib.suppress(FederationError):
            return bool(self._json("stop", run_id, self.connection, timeout_s=20).get("success"))
        return False

    def _json(self, *args: str, timeout_s: float) -> dict[str, Any]:
        where = superlink_of(self.connection, self._env)
        try:
            done = self._call(*args, "--format", "json", timeout_s=timeout_s)
        except subprocess.TimeoutExpired as err:
            raise FederationError(
                f"`flwr {args[0]}` gave no answer within {timeout_s:.0f} s; is the SuperLink {where} reachable?"
            ) from err
        try:
            # Flower may warn of something on the lines before.
            answer: dict[str, Any] = parse_json(done.stdout[done.stdout.index("{") :].encode())
        except ValueError as err:
            words = (done.stderr or done.stdout).strip()
            raise in_words(args[0], words or f"exit code {done.returncode}", where) from err
        if not answer.get("success"):
            raise in_words(args[0], str(answer.get("error-message")).strip(), where)
        return answer

    def _call(self, *args: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program("flwr", self._env), *args],
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
            **DETACHED,
        )


class LocalSuperLink(Closing):
    """A SuperLink of our own in simulation mode, on loopback, with its state in memory.

    A context manager: on the way out everything it started has ended and its folder is gone.
    """

    def __init__(self) -> None:
        self.home = _short_folder()
        self.env = flower_environment(self.home)
        self.env.pop("RAY_ADDRESS", None)
        self.env["RAY_TMPDIR"] = str(self.home)
        self.commands = FlowerCommands(CONNECTION, self.env)
        self.tree = ProcessTree()
        self._process: subprocess.Popen[bytes] | None = None
        self._engine: psutil.Process | None = None
        self._log = self.home / "superlink.log"

    def __enter__(self) -> LocalSuperLink:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def simulating(self) -> bool:
        """True while the process that runs the apps is there: far cheaper than asking Flower."""
        if self._engine is None:
            self.tree.refresh()
            self._engine = self.tree.find("flwr-simulation")
        return self._engine is not None and runs(self._engine)

    def log_tail(self, lines: int = 15) -> str:
        """The end of the SuperLink's own log."""
        try:
            text = self._log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """End every process that was started here, then remove the folder. May be called twice."""
        with held_signals(drop=True):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_CLOSE_TIMEOUT_S)
            # Nothing is left here, unless the keeper itself was killed.
            self.tree.end()
            shutil.rmtree(self.home, ignore_errors=True)

    def _start(self) -> None:
        port = free_port()
        toml = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(toml, encoding="utf-8")
        command = [program("flower-superlink", self.env), "--insecure", "--simulation"]
        command += ["--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        # An interrupt between start and adoption would leave a process that nobody knows of.
        with self._log.open("wb") as log, held_signals():
            self._process = process = kept(
                command, remove=str(self.home), env=self.env, stdout=log, stderr=log
            )
            self.tree.adopt(process.pid)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise FederationError(f"Flower's SuperLink did not start:\n{self.log_tail()}")
            time.sleep(0.1)
        self.tree.refresh()


def _short_folder() -> Path:
    """A new folder for Flower and Ray. Raises FederationError where none is short enough for the paths of Ray's sockets."""
    base = tempfile.gettempdir()
    # Systems bound the path of a socket, and what is too long fails late and without the cause.
    for place in (base, "/tmp", "/var/tmp"):
        room = (
            _SOCKET_PATH_BYTES - _RAY_SOCKET_BYTES - len(os.fsencode(place)) - len("/fs-12345678")
        )
        if (room > 0 or os.name == "nt") and os.access(place, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="fs-", dir=place))
    raise FederationError(
        f"the folder for temporary files has too long a name for Ray's sockets, and /tmp cannot be written: {base}; "
        f"set TMPDIR to a folder of at most {_SOCKET_PATH_BYTES - _RAY_SOCKET_BYTES - 13} characters"
    )


def _healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
