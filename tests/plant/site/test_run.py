"""`site run`: what is checked first, renewals, reports, the end of a membership, and the years between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsplit.core.errors import (
    ConfigError,
    DataError,
    FedsplitError,
    NotMemberError,
    ServerAwayError,
    ServerRefusalError,
    ServiceError,
)
from fedsplit.plant.lock import taken
from fedsplit.plant.service import Service
from fedsplit.plant.site import keys, renew, report
from fedsplit.plant.site import run as module
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.join import Joined
from fedsplit.plant.site.services import RUNTIME, SUPERNODE, node_config, services
from fedsplit.plant.site.trust import clock_fault

from .server import Control

Join = Callable[..., Joined]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def folder(joined: Join) -> SiteFolder:
    return joined().folder


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """In place of Flower and torch: programs that do nothing."""
    commands = {SUPERNODE: SLEEP, RUNTIME: SLEEP}

    def fake(folder: SiteFolder) -> list[Service]:
        return [
            Service(name, command, folder.logs / f"{name}.jsonl")
            for name, command in commands.items()
        ]

    monkeypatch.setattr(module, "services", fake)
    monkeypatch.setattr(report, "EVERY_S", 0.2)
    monkeypatch.setattr(report, "AWAY_EVERY_S", 0.2)
    return commands


@contextmanager
def running(folder: SiteFolder) -> Iterator[tuple[list[str], list[FedsplitError]]]:
    """The site in a thread: what it says, and how it ended."""
    told: list[str] = []
    ended: list[FedsplitError] = []
    stop = threading.Event()

    def go() -> None:
        try:
            module.run(folder, stop, say=told.append, ready=lambda: told.append("READY"))
        except FedsplitError as err:
            ended.append(err)

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield told, ended
    finally:
        stop.set()
        thread.join(15)
        assert not thread.is_alive()


def wait_for(what: Callable[[], object], within_s: float = 15.0) -> None:
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def running_pids(folder: SiteFolder) -> list[int]:
    if not folder.state.exists():
        return []
    services = json.loads(folder.state.read_text())["services"].values()
    return [s["pid"] for s in services if s["pid"]]


def does(folder: SiteFolder, **what: object) -> None:
    """What the runtime would write of itself."""
    wait_for(lambda: len(running_pids(folder)) == 2)
    what["pid"] = json.loads(folder.state.read_text())["services"][RUNTIME]["pid"]
    folder.doing.write_text(json.dumps(what), encoding="utf-8")


def test_the_supernode_reads_the_node_config_as_it_is_meant(
    folder: SiteFolder, pictures: Path
) -> None:
    from flwr.common.config import parse_config_args

    command = services(folder)[0].command
    found = parse_config_args([command[command.index("--node-config") + 1]])
    assert found == node_config(folder)
    assert found["tasks"] == f"inspection=folder:{pictures}"
    assert found["encoder-tls-key"] == str(folder.certificate_key)
    # Nothing that is secret stands where other users of the machine can read it.
    secret = folder.superexec_secret.read_text()
    assert not any(secret in word for service in services(folder) for word in service.command)


def test_a_source_with_a_semicolon(joined: Join, pictures: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a;b"
    odd.symlink_to(pictures)
    found = node_config(joined(data=f"folder:{odd}").folder)
    assert (found["tasks"], found["data"]) == ("inspection", f"folder:{odd}")


def test_reports_say_how_the_site_is(
    folder: SiteFolder, control: Control, sleepers: dict[str, list[str]]
) -> None:
    with running(folder) as (told, ended):
        wait_for(lambda: len(control.reports) > 1)
        assert {r.state for r in control.reports} == {"starting"}
        folder.doing.write_text('{"state": "stopping", "pid": 1}')  # of one that has ended
        does(folder, state="idle", backbone_loads=1)
        wait_for(lambda: "READY" in told)
        does(folder, state="working", detail="run night: train, round 3", backbone_loads=1)
        wait_for(lambda: control.reports[-1].state == "working")
        last = control.reports[-1]
        assert last.detail == "run night: train, round 3"
        assert last.backbone_loads == 1
        assert last.rss_bytes > 3_000_000
        assert last.disk_free_bytes > 0
        assert last.certificate_ends == keys.ends(keys.certificate(folder))
        assert told.count("READY") == 1
        assert "working: run night: train, round 3" in told
    assert not ended


def test_a_server_that_is_away_and_comes_back(
    folder: SiteFolder, control: Control, sleepers: dict[str, list[str]]
) -> None:
    with running(folder) as (told, ended):
        wait_for(lambda: control.reports)
        control.refusal = (503, "starting", "the control service starts")
        wait_for(lambda: any("the site waits and tries again" in line for line in told))
        time.sleep(1)
        control.refusal = None
        wait_for(lambda: "the server answers again" in told)
        assert sum("waits and tries again" in line for line in told) == 1
    assert not ended


def test_a_server_that_says_nothing_does_not_hold_up_the_end(
    folder: SiteFolder, control: Control, sleepers: dict[str, list[str]]
) -> None:
    with (
        contextlib.ExitStack() as stack,
        socket.create_server(("127.0.0.1", 0)) as silent,
        running(folder) as (_, ended),
    ):
        wait_for(lambda: control.reports)
        object.__setattr__(folder.settings.site, "address", f"127.0.0.1:{silent.getsockname()[1]}")
        os.utime(folder.certificate)  # a new connection
        silent.settimeout(15)
        line, _ = silent.accept()
        time.sleep(0.5)
        began = time.monotonic()
        stack.callback(line.close)
    assert time.monotonic() - began < 10
    assert not ended


@pytest.mark.parametrize("how", ["standing", "refusal"])
def test_a_site_that_is_put_out_meanwhile_ends_with_the_reason(
    folder: SiteFolder, control: Control, sleepers: dict[str, list[str]], how: str
) -> None:
    with running(folder) as (_, ended):
        wait_for(lambda: control.reports)
        wait_for(lambda: len(running_pids(folder)) == 2)
        pids = running_pids(folder)
        if how == "standing":
            control.standing = "revoked"
        else:
            control.refusal = (403, "revoked", "site 'line-a' was revoked on 2026-11-20")
        wait_for(lambda: ended)
    assert isinstance(ended[0], NotMemberError)
    assert "no member of the federation" in str(ended[0])
    assert "join CODE --dir" in str(ended[0])
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_supernode_that_is_refused_is_explained(
    folder: SiteFolder, control: Control, sleepers: dict[str, list[str]]
) -> None:
    sleepers[SUPERNODE] = [sys.executable, "-c", "raise SystemExit(1)"]
    with running(folder) as (told, ended):
        wait_for(lambda: any("is a member as before" in line for line in told))
        wait_for(lambda: any(r.state == "failing" for r in control.reports))
        time.sleep(3)
        # Never in a tight loop: 1 s, 2 s, 4 s.
        assert json.loads(folder.state.read_text())["services"][SUPERNODE]["restarts"] <= 3
    assert not ended


def test_a_clock_that_goes_wrong_is_told(
    folder: SiteFolder, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    found = {name: {"state": "up", "pid": None} for name in (SUPERNODE, RUNTIME)}
    with report.Reports(folder, services=lambda: found, say=told.append) as reports:
        monkeypatch.setattr(report, "clock_fault", lambda _: clock_fault(time.time() - 60))
        reports.step()
        assert any("clock is 60 s ahead" in line for line in told)
        reports._due = 0.0
        reports.step()
        assert control.reports[-1].state == "failing"
        assert "clock" in control.reports[-1].detail


@pytest.mark.parametrize("fault", ["clock", "data", "over", "key", "revoked", "settings"])
def test_what_is_wrong_is_known_before_anything_starts(
    joined: Join, control: Control, sleepers: dict[str, list[str]], tmp_path: Path, fault: str
) -> None:
    control.days = 1e-6 if fault == "over" else 30
    folder = joined().folder
    toml = folder.path / "site.toml"
    wanted: tuple[type[Exception], str] = (ConfigError, "")
    if fault == "clock":
        control.clock_s, wanted = -3600, (ConfigError, "clock is 3,600 s ahead of the server's")
    elif fault == "data":
        text = toml.read_text(encoding="utf-8")
        line = next(li for li in text.splitlines() if li.startswith("data = "))
        toml.write_text(text.replace(line, 'data = "folder:/gone"'), encoding="utf-8")
        wanted = (DataError, r"/gone does not exist; correct data in .*site\.toml")
    elif fault == "over":
        wanted = (NotMemberError, "was over on .*joins again with a new code")
    elif fault == "revoked":
        control.standing, wanted = "revoked", (NotMemberError, "it was revoked.*joins again")
    elif fault == "key":
        other = keys.next_key(folder)
        (folder.path / "site-key.pem.next").replace(folder.certificate_key)
        assert other
        wanted = (ConfigError, "is not the key of site.pem")
    else:
        toml.write_text('format = 1\n[site]\nname = 3\ncutt = "1,2"\n[machine]\nthreads = -1\n')
        wanted = (ConfigError, r"(?s)site\.name.*site\.cutt.*machine\.threads")
    with pytest.raises(wanted[0], match=wanted[1]):
        module.run(
            SiteFolder(folder.path), threading.Event(), say=lambda _: None, ready=lambda: None
        )
    assert not list(folder.logs.iterdir())


def test_a_server_that_is_away_at_the_start_is_waited_for(
    folder: SiteFolder, control: Control
) -> None:
    control.refusal = None
    told: list[str] = []
    text = (folder.path / "site.toml").read_text(encoding="utf-8")
    away = text.replace(control.address, "127.0.0.1:1")
    (folder.path / "site.toml").write_text(away, encoding="utf-8")
    module.check(SiteFolder(folder.path), told.append)
    assert "starts all the same and waits" in told[0]


def test_another_version_is_told(folder: SiteFolder, control: Control) -> None:
    control.version, told = "9.9", []
    module.check(folder, told.append)
    assert "server has fedsplit 9.9" in told[0]


def test_twice_in_one_folder(folder: SiteFolder) -> None:
    lock = taken(folder.state)
    folder.state.write_text(json.dumps({"pid": 4711}))
    try:
        with pytest.raises(ServiceError, match="4711"):
            module.run(folder, threading.Event(), say=lambda _: None, ready=lambda: None)
    finally:
        lock.release()


def test_a_certificate_renews_itself(joined: Join, control: Control) -> None:
    control.days = 1.0
    folder = joined().folder
    told: list[str] = []
    renewals = renew.Renewals(folder, say=told.append)
    # Just made, and an hour old by what it says: two thirds are not over.
    assert 0 < renewals.step() <= 3600
    assert control.renewed == 0
    first, first_key = folder.certificate.read_bytes(), folder.certificate_key.read_bytes()
    before = keys.ends(keys.certificate(folder)) - 8 * 3600
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renew.time, "time", lambda: before)
        renewals.step()
    assert control.renewed == 1
    assert folder.certificate.read_bytes() != first
    assert folder.certificate_key.read_bytes() != first_key
    assert folder.certificate_key.stat().st_mode & 0o777 == 0o600
    keys.certificate(folder)  # they are a pair
    assert not list(folder.path.glob("*.next"))
    assert "is renewed, until" in told[0]


def test_a_renewal_that_fails_is_told_daily_and_keeps_its_key(
    joined: Join, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = joined().folder
    now = keys.ends(keys.certificate(folder)) - 9 * 86400
    monkeypatch.setattr(renew.time, "time", lambda: now)
    control.refusal = (503, "starting", "the control service starts")
    told: list[str] = []
    renewals = renew.Renewals(folder, say=told.append)
    waits = [renewals.step() for _ in range(8)]
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert len(told) == 1
    assert "is over in 9.0 days" in told[0]
    assert "the control service starts" in told[0]
    waiting = (folder.path / "site-key.pem.next").read_bytes()
    control.refusal = None
    renewals.step()
    assert folder.certificate_key.read_bytes() == waiting


def test_a_key_that_is_refused_is_not_tried_for_ever(
    joined: Join, control: Control, folder: SiteFolder
) -> None:
    def waiting() -> bytes:
        return (folder.path / "site-key.pem.next").read_bytes()

    control.refusal = (503, "starting", "the control service starts")
    with pytest.raises(ServerAwayError):
        renew.renew(folder)
    first = waiting()
    control.refusal = (409, "key-used", "this key was in force before")
    with pytest.raises(ServerRefusalError, match="in force before"):
        renew.renew(folder)
    control.refusal = (503, "starting", "the control service starts")
    with pytest.raises(ServerAwayError):
        renew.renew(folder)
    assert waiting() != first
    # A site that joins again begins anew.
    control.refusal = None
    joined(again=True)
    assert not list(folder.path.glob("*.next"))


@pytest.mark.parametrize("cut_at", ["before", "between"])
def test_a_power_cut_in_a_renewal(
    folder: SiteFolder, control: Control, monkeypatch: pytest.MonkeyPatch, cut_at: str
) -> None:
    first = folder.certificate.read_bytes()
    done = Path.replace
    steps: list[str] = []

    def cut(self: Path, target: Any) -> Path:
        if Path(target).name in ("site-key.pem", "site.pem"):
            steps.append(Path(target).name)
            if len(steps) == (1 if cut_at == "before" else 2):
                raise OSError(5, "power cut")
        return done(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        renew.renew(folder)
    monkeypatch.undo()
    keys.repaired(folder)
    keys.certificate(folder)  # they are a pair
    assert folder.certificate.read_bytes() != first
    assert not list(folder.path.glob("*.next"))


def test_the_parent_stays_light(folder: SiteFolder) -> None:
    heavy = {"torch", "transformers", "peft", "pandas", "sklearn", "scipy", "flwr", "grpc", "PIL"}
    code = (
        "import sys, fedsplit.cli.main, fedsplit.cli.site, fedsplit.plant.site.run as r, threading\n"
        "from fedsplit.plant.site.folder import SiteFolder\n"
        "folder = SiteFolder.at(__import__('pathlib').Path(sys.argv[1]))\n"
        "r.check(folder, print); r.services(folder); r.keep_bounded(folder, print)\n"
        f"found = {heavy!r} & set(sys.modules)\n"
        "sys.exit(f'loaded: {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_ends_everything_within_ten_seconds(
    folder: SiteFolder, tmp_path: Path, control: Control
) -> None:
    """The program as it is: a real SuperNode, which is refused here, and a signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsplit.cli.main", "site", "run", str(folder.path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: control.reports, 30)
        second = subprocess.run(
            [sys.executable, "-m", "fedsplit.cli.main", "site", "run", str(folder.path)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert str(process.pid) in second.stderr
        children = psutil.Process(process.pid).children(recursive=True)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=15)
        assert time.monotonic() - began < 10
        assert process.returncode == 0, said
        assert "has ended" in said
        assert not [p for p in children if p.is_running() and p.status() != "zombie"]
    finally:
        if process.poll() is None:
            process.kill()


def test_site_toml_says_what_it_was_given(folder: SiteFolder) -> None:
    found = tomllib.loads((folder.path / "site.toml").read_text(encoding="utf-8"))
    assert found["format"] == 1
    assert found["site"]["name"] == "line-a"
