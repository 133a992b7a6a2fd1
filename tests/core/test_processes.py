"""Real child processes, also those that detach, ignore signals or lose their parent: none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from fedsplit.core.processes import ProcessTree, held_signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sessions are POSIX")

FAMILY = """
import signal, subprocess, sys, time
kind = sys.argv[1]
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif kind == "orphans":
    # A session leader of its own whose parent goes: its children are nobody's.
    leader = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", leader], start_new_session=True)
else:
    subprocess.Popen(sleep)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, of the kind that the test asks for."""
    command = [sys.executable, "-c", FAMILY, request.param]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        yield process
        process.kill()


@pytest.mark.parametrize("family", ["plain", "orphans"], indirect=True)
def test_all_descendants_end(family: subprocess.Popen[str]) -> None:
    tree = ProcessTree()
    tree.adopt(family.pid)
    tree.refresh()
    members = tree.running()
    assert len(members) >= 2
    assert tree.end() == []
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in members)


@pytest.mark.parametrize("family", ["orphans"], indirect=True)
def test_orphans_end_after_their_parents_are_gone(family: subprocess.Popen[str]) -> None:
    tree = ProcessTree()
    tree.adopt(family.pid)
    tree.refresh()
    before = {p.pid for p in tree.running()}
    family.kill()
    family.wait()
    assert {p.pid for p in tree.running()} == before - {family.pid}
    assert tree.end() == []


@pytest.mark.parametrize("family", ["deaf"], indirect=True)
def test_deaf_process_is_killed(family: subprocess.Popen[str]) -> None:
    tree = ProcessTree()
    tree.adopt(family.pid)
    assert tree.end(grace_s=0.3) == []
    assert family.wait() == -signal.SIGKILL


@pytest.mark.parametrize("family", ["plain"], indirect=True)
def test_strangers_are_not_ours(family: subprocess.Popen[str]) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        tree = ProcessTree()
        tree.adopt(family.pid)
        tree.end()
        assert stranger.poll() is None
        assert os.getpid() not in {p.pid for p in tree.running()}
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("family", ["plain"], indirect=True)
def test_find_looks_at_the_command(family: subprocess.Popen[str]) -> None:
    tree = ProcessTree()
    tree.adopt(family.pid)
    assert tree.find("python") is not None
    assert tree.find("flwr-simulation") is None
    tree.end()


def test_nothing_adopted_nothing_done() -> None:
    assert ProcessTree().end() == []


def test_interrupt_waits_until_the_block_is_through() -> None:
    done = []

    def work() -> None:
        with held_signals():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]


def test_interrupt_is_dropped_while_cleaning_up() -> None:
    with held_signals(drop=True):
        signal.raise_signal(signal.SIGINT)
