"""The supervisor over real processes: order, readiness, back-off, the end, its own death, and what it tells."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedsplit.core.errors import ServiceError
from fedsplit.core.processes import runs
from fedsplit.plant import service, supervisor
from fedsplit.plant.lock import running_pid, taken
from fedsplit.plant.logs import read_tail
from fedsplit.plant.service import Service
from fedsplit.plant.supervisor import Supervisor, stop_on_signals

SLEEP = "import time; time.sleep(600)"


def python(name: str, code: str, folder: Path, **options: object) -> Service:
    command = [sys.executable, "-u", "-c", code]
    return Service(name, command, folder / "logs" / f"{name}.jsonl", **options)  # type: ignore[arg-type]


@contextmanager
def running(services: list[Service], folder: Path, told: list[str]) -> Iterator[Supervisor]:
    """The services, up, in a thread; ended afterwards within 10 s."""
    (folder / "logs").mkdir(exist_ok=True)
    up, stop = threading.Event(), threading.Event()
    with Supervisor(services, state_file=folder / "run" / "state.json", say=told.append) as it:
        thread = threading.Thread(target=it.run, args=[stop], kwargs={"on_up": up.set})
        thread.start()
        try:
            assert up.wait(20)
            yield it
        finally:
            stop.set()
            thread.join(10)
            assert not thread.is_alive()


def state(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((folder / "run/state.json").read_text())
    return found


def alive(pid: object) -> bool:
    assert isinstance(pid, int)
    try:
        return runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def wait_for(what: object, within_s: float = 15.0) -> None:
    end = time.monotonic() + within_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_starts_when_the_one_before_is_ready_and_all_end(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make = "import pathlib, sys, time; {}; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    services = [
        Service(
            name,
            [sys.executable, "-c", make.format(f"time.sleep({wait})"), str(path)],
            tmp_path / "logs" / f"{name}.jsonl",
            ready=path.exists,
            port=port,
        )
        for name, path, wait, port in [("one", first, 0.5, 17), ("two", second, 0, 0)]
    ]
    with running(services, tmp_path, []):
        assert first.stat().st_mtime_ns < second.stat().st_mtime_ns
        found = state(tmp_path)
        assert found["pid"] == os.getpid()
        assert found["services"]["one"]["state"] == "up"  # type: ignore[index]
        assert found["services"]["one"]["port"] == 17  # type: ignore[index]
        pids = [found["services"][n]["pid"] for n in ("one", "two")]  # type: ignore[index]
        assert all("-c" in psutil.Process(pid).cmdline() for pid in pids)  # type: ignore[arg-type]
    assert not any(alive(pid) for pid in pids)
    assert state(tmp_path)["services"]["one"]["state"] == "down"  # type: ignore[index]
    assert running_pid(tmp_path / "run/state.json") is None


def test_one_that_dies_is_named_and_starts_again_with_its_children_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BACK_OFF_S", 0.2)
    # Its child leads a session of its own, as Flower's SuperExec's do.
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True); print('child', p.pid); {SLEEP}"
    told: list[str] = []
    with running([python("work", code, tmp_path)], tmp_path, told) as it:
        log = tmp_path / "logs/work.jsonl"
        wait_for(lambda: log.exists() and read_tail(log))
        orphan = int(read_tail(log)[-1]["text"].split()[1])
        old = it.state()["services"]["work"]["pid"]
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: it.state()["services"]["work"]["restarts"] == 1)
        wait_for(lambda: it.state()["services"]["work"]["state"] == "up")
        assert it.state()["services"]["work"]["pid"] != old
        assert not alive(orphan)
        assert "signal SIGKILL" in it.state()["services"]["work"]["last_exit"]["why"]
        wait_for(lambda: state(tmp_path)["services"]["work"]["restarts"] == 1)  # type: ignore[index]
    assert len(told) == 1
    assert told[0].startswith("work ended by itself (signal SIGKILL)")
    assert "starts again in" in told[0]
    assert any("starts again" in e["text"] and e["level"] == "error" for e in read_tail(log))


def test_the_waits_double_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "BACK_OFF_S", 0.05)
    monkeypatch.setattr(service, "MAX_BACK_OFF_S", 0.15)
    told: list[str] = []
    with running(
        [python("ill", "print('why'); raise SystemExit(3)", tmp_path)], tmp_path, told
    ) as it:
        wait_for(lambda: len(told) >= 3)
        assert it._children[0].wait_s == pytest.approx(0.15)
    assert "exit code 3" in told[0]
    assert told[0].endswith("It said: why")


def test_what_does_not_come_up_at_first_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    ill = python("ill", "print('no such port'); raise SystemExit(3)", tmp_path, ready=bool)
    with (
        Supervisor([ill], state_file=tmp_path / "run/state.json", say=print) as it,
        pytest.raises(ServiceError, match=r"(?s)ill ended by itself \(exit code 3\).*no such port"),
    ):
        it.run(threading.Event())


def test_one_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    ill = python("slow", SLEEP, tmp_path, ready=lambda: False, ready_s=0.7)
    with Supervisor([ill], state_file=tmp_path / "run/state.json", say=print) as it:
        with pytest.raises(ServiceError, match="slow was not ready within 1 s"):
            it.run(threading.Event())
        assert it.state()["services"]["slow"]["pid"] is None


def test_what_an_earlier_one_left_is_ended_and_nobody_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLEEP]
    told: list[str] = []
    with (
        subprocess.Popen([*command, f"--of={tmp_path}"]) as ours,
        subprocess.Popen(command) as theirs,
    ):
        left = {"ours": {"pid": ours.pid}, "theirs": {"pid": theirs.pid}, "none": {"pid": None}}
        file = tmp_path / "run" / "state.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"pid": 1, "services": left}))
        try:
            with Supervisor([], state_file=file, say=told.append):
                assert ours.wait(10) != 0
                assert theirs.poll() is None
        finally:
            ours.kill()
            theirs.kill()
    assert told == [f"ours (process {ours.pid}) is left over from an earlier time; it is ended"]
    file.write_text('{"services": 3}')
    Supervisor([], state_file=file, say=print).close()


def test_one_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "ASK_S", 0.05)
    monkeypatch.setattr(service, "BACK_OFF_S", 0.05)
    answers = threading.Event()
    answers.set()
    told: list[str] = []
    with running([python("deaf", SLEEP, tmp_path, ready=answers.is_set)], tmp_path, told) as it:
        old = it.state()["services"]["deaf"]["pid"]
        answers.clear()
        wait_for(lambda: told)
        answers.set()
        wait_for(lambda: it.state()["services"]["deaf"]["state"] == "up")
        assert it.state()["services"]["deaf"]["pid"] != old
        assert not alive(old)
    assert "deaf hung: it did not answer 6 times in a row" in told[0]


def test_a_second_one_in_the_folder_is_refused_by_the_firsts_number(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    file = tmp_path / "run/state.json"
    with Supervisor([], state_file=file, say=print):
        code = f"from pathlib import Path; from fedsplit.plant.lock import taken; taken(Path({str(file)!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"run already: process {os.getpid()} keeps them" in done.stderr
    taken(file).release()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_killed_outright_it_leaves_nothing_behind(tmp_path: Path) -> None:
    code = f"""
import sys, threading
from pathlib import Path
from fedsplit.plant.service import Service
from fedsplit.plant.supervisor import Supervisor
folder = Path({str(tmp_path)!r})
(folder / "logs").mkdir()
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
services = [Service("deaf", [sys.executable, "-uc", deaf], folder / "logs/deaf.jsonl", stop_s=0.5)]
with Supervisor(services, state_file=folder / "run/state.json", say=print) as it:
    it.run(threading.Event(), on_up=lambda: print("up", flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        assert it.stdout.readline() == "up\n"
        wait_for(lambda: read_tail(tmp_path / "logs/deaf.jsonl"))
        pid = running_pid(tmp_path / "run/state.json")
        assert pid == it.pid
        child = state(tmp_path)["services"]["deaf"]["pid"]  # type: ignore[index]
        it.kill()
    wait_for(lambda: not alive(child))
    taken(tmp_path / "run/state.json").release()


@pytest.mark.skipif(os.name == "nt", reason="a Unix socket")
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        with running([python("work", SLEEP, tmp_path)], tmp_path, []):
            assert sock.recv(100) == b"EXTEND_TIMEOUT_USEC=120000000"
            while (heard := sock.recv(100)) != b"READY=1":
                assert heard.startswith(b"EXTEND")
            assert sock.recv(100) == b"WATCHDOG=1"
        assert "NOTIFY_SOCKET" not in os.environ


def test_a_signal_sets_stop() -> None:
    stop = threading.Event()
    with stop_on_signals(stop):
        signal.raise_signal(signal.SIGINT)
    assert stop.is_set()


def test_a_full_disk_is_told_once_and_the_services_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with running([python("work", SLEEP, tmp_path)], tmp_path, told) as it:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "write_whole", full)
            it._children[0]._restarts = 1
            wait_for(lambda: told)
            time.sleep(1.2)
        assert len(told) == 1
        assert "No space left on device" in told[0]
        wait_for(lambda: state(tmp_path)["services"]["work"]["restarts"] == 1)  # type: ignore[index]
