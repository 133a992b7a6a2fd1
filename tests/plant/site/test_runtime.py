"""The resident runtime as a process beside the Runtime API of a real SuperNode: it answers, says what it does, and ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message, RecordDict

from benchmarks.supernode import SECRET, SuperNode, asking, supernode
from fedsplit.cli.main import call
from fedsplit.core.errors import ConfigError
from fedsplit.federation import executor, messages
from fedsplit.plant.site import runtime
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.runtime import Place, resident
from tests.federation.test_executor import an_order, until
from tests.system.flower import BIN


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "executor.secret"
    path.write_bytes(SECRET)
    return path


def told(folder: Path) -> dict[str, Any]:
    path = folder / "runtime.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


@contextmanager
def process(node: SuperNode, secret: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [str(BIN / "fedsplit"), "site", "executor", "--supernode", node.address]
    command += ["--secret-file", str(secret), "--state-dir", str(folder)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def test_the_process_answers_and_says_what_it_does(secret: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with supernode({"site": "a"}) as node, process(node, secret, state) as child:
        # What came before it did.
        node.give(asking(RecordDict({})))
        assert "installs no other app" in str(node.reply(60).error.reason)
        until(lambda: told(state).get("orders") == 1)
        found = told(state)
        argv = psutil.Process(child.pid).cmdline()
        child.terminate()
        began = time.monotonic()
        _, log = child.communicate(timeout=10)
        assert time.monotonic() - began < 5
        assert child.returncode == 0
    assert (found["state"], found["pid"], found["backbone_loads"]) == ("idle", child.pid, 0)
    assert found["rss_bytes"] > 100 * 2**20
    assert told(state)["state"] == "stopping"
    assert "the code: loaded in" in log
    assert "HTTP Request" not in log
    assert SECRET.decode() not in log + " ".join(argv)


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_step_that_does_not_end_is_left_and_the_run_told(
    secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, stop, ended = threading.Event(), threading.Event(), []

    def stuck(message: Message, context: Context, own: Any, **hooks: Any) -> Message:
        release.wait(30)
        return Message(RecordDict({}), reply_to=message)

    made: list[executor.Executor] = []

    def make(*args: Any, **more: Any) -> executor.Executor:
        made.append(executor.Executor(*args, **more))
        return made[0]

    monkeypatch.setattr(executor, "answer", stuck)
    monkeypatch.setattr(runtime, "Executor", make)
    monkeypatch.setattr(runtime, "_STEP_S", 0.2)
    with supernode({"site": "a"}) as node:
        place = Place(node.address, secret, note=tmp_path / "order")
        thread = in_a_thread(lambda: ended.append(resident(place, stop)))
        node.give(an_order())
        until(lambda: (tmp_path / "order").exists())
        stop.set()
        fault = messages.fault_of(node.reply())
        thread.join(10)
        assert not (tmp_path / "order").exists()
        release.set()
        until(lambda: made[0].told.orders == 1)
        # The process would have ended: nothing is closed under the step.
        made[0].close()
    assert ended == [False]
    assert fault is not None
    assert fault.message == "the site's runtime is being stopped"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("import re; re.match(r'(a+)+$', 'a' * 60 + 'b')", "Timeout (0:00:01)!"),
        ("time.sleep(0.1); alive(Doing(detail='run x', until=time.time() - 9))", "run x: not left 9 s after"),
    ],
    ids=["python is held", "an order is not left"],
)  # fmt: skip
def test_a_runtime_that_hangs_ends_and_says_where(does: str, said: str) -> None:
    program = (
        "import time; from fedsplit.federation.executor import Doing\n"
        "from fedsplit.plant.site.runtime import unless_it_hangs\n"
        f"with unless_it_hangs(1.0) as alive: alive(Doing()); {does}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert 'File "<string>", line 3' in done.stderr


def test_what_is_wrong_is_said_before_anything_is_loaded(
    tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be read .No such file.*--superexec-auth-secret-file"
    ):
        resident(Place("127.0.0.1:1", tmp_path / "none"), threading.Event())
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="is empty"):
        resident(Place("127.0.0.1:1", tmp_path / "empty"), threading.Event())
    link = Place("127.0.0.1:1", secret, superlink="h:1", node_key=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"node key .* cannot be read"):
        resident(link, threading.Event())
    with pytest.raises(ConfigError, match=r"holds no site\.toml"):
        Place.of(SiteFolder.at(tmp_path))
    assert runtime.main([str(tmp_path)]) == 2
    argv = ["site", "executor", "--supernode", "127.0.0.1:1", "--secret-file", str(secret)]
    assert call([*argv, "--superlink", "h:1"]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.mark.parametrize("state", [None, "{", "[]", '{"services": {"supernode": {"port": 0}}}'])
def test_a_site_folder_whose_supernode_does_not_run_is_told(
    state: str | None, tmp_path: Path
) -> None:
    folder = SiteFolder(tmp_path)
    if state is not None:
        folder.present.mkdir()
        folder.state.write_text(state)
    with pytest.raises(ConfigError, match="names no SuperNode; `fedsplit site run"):
        Place.of(folder)
