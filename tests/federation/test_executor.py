"""The resident executor against the Runtime API of a real SuperNode: its answers, and what it does when something ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from benchmarks.supernode import SECRET, SuperNode, asking, supernode
from fedsplit import __version__
from fedsplit.core.errors import ConfigError, SuperNodeError
from fedsplit.core.orders import Order
from fedsplit.core.programs import free_port
from fedsplit.federation import at_hand, executor, flower_runtime, messages
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.executor import Executor
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.federation.site import answer, new_runtime
from fedsplit.plant import pki
from fedsplit.site.runtime import SiteRuntime
from fedsplit.training.site_settings import SiteSettings
from fedsplit.trunk.process import hosting
from tests.federation.conftest import settings, simulated


def an_order(run: str = "run", round_: int = 3) -> Message:
    order = Order(
        kind="train", run=run, round=round_, fedsplit_version=__version__, config={}, classes=("a", "b"), cut="0,6",
        rank=4, backbone_sha256="0" * 64, stream=None,
    )  # fmt: skip
    return asking(messages.write(messages.ORDER, order))


@contextmanager
def running(
    node: SuperNode, runtime: SiteRuntime | None = None, **other: Any
) -> Iterator[Executor]:
    stop = threading.Event()
    with Executor(node.address, SECRET, runtime or new_runtime(), **other) as own:
        thread = threading.Thread(target=own.run, args=(stop,))
        thread.start()
        try:
            yield own
        finally:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()


def until(true: Callable[[], object], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def working_until_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that takes for ever, in steps."""

    def steps(message: Message, context: Context, runtime: Any, **hooks: Any) -> Message:
        hooks["begins"](messages.read(message.content, messages.ORDER, Order))
        while not (why := hooks["cancelled"]()):
            time.sleep(0.01)
        return Message(
            messages.write(messages.FAULT, messages.Fault(kind="FederationError", message=why)),
            reply_to=message,
        )

    monkeypatch.setattr(executor, "answer", steps)
    monkeypatch.setattr(at_hand, "LOOK_S", 0.02)
    monkeypatch.setattr(at_hand, "BEAT_S", 0.02)


# Runs.


def federate(runs: Path, name: str, through: Callable[[Message, Context], Message]) -> Path:
    """A run of two sites, each message of which `through` answers; its module."""
    config = settings(runs, run_name=name, max_samples=60, rounds=1)
    with hosting(config, None) as (server, host, key):
        endpoint = Endpoint(
            server.address, key, tls=False, ca_file="", publish=host.publish, collect=host.collect
        )
        with InProcessGrid(simulated(2), through) as grid:
            summary = Run(grid, config, endpoint, simulated=True).go()
    assert summary.outcome == "complete", summary
    return runs / name / "module" / "adapter_model.safetensors"


def test_a_run_through_executors_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    plain = new_runtime()
    theirs = load_file(federate(tmp_path, "plain", lambda m, c: answer(m, c, plain)))
    with ExitStack() as stack:
        nodes = {101 + i: stack.enter_context(supernode(c)) for i, c in enumerate(simulated(2))}
        executors = [stack.enter_context(running(node)) for node in nodes.values()]

        def through(message: Message, context: Context) -> Message:
            own = message.metadata.message_id
            nodes[context.node_id].give(message)
            reply = nodes[context.node_id].reply()
            reply.metadata.__dict__["_reply_to_message_id"] = own
            return reply

        ours = load_file(federate(tmp_path, "resident", through))
        # Roll call, a round, the last test.
        until(lambda: all(e.told.state == "idle" and e.told.orders == 3 for e in executors))
        assert [e.told.last_error for e in executors] == ["", ""]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_a_process_a_message_says_that_it_is_slow() -> None:
    site = SiteSettings.from_node({"site": "a", "data": "digits"}, node_id=1)
    shared = SiteSettings.from_node({"partition-id": 0, "num-partitions": 2}, node_id=1)
    (note,) = new_runtime()._process_note(site)
    assert note.startswith("each message starts a process here")
    assert SiteRuntime()._process_note(site) == ()
    assert new_runtime()._process_note(shared) == ()


# Messages that are no order.


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("train", RecordDict({})),
        ("system.what", an_order().content),
    ],
)
def test_what_is_no_order_gets_a_clear_error(kind: str, content: RecordDict) -> None:
    with supernode({"site": "a"}, app=("someone/else", "1")) as node, running(node):
        node.give(asking(content, kind))
        reply = node.reply()
    assert reply.has_error()
    assert "installs no other app" in str(reply.error.reason)
    assert f"{kind!r} message of the app someone/else" in str(reply.error.reason)
    fault = messages.fault_of(reply)
    assert fault is not None
    assert "no such order" in fault.message


def test_a_bug_costs_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Message:
        raise MemoryError("no memory")

    with supernode({"site": "a"}) as node, running(node) as own:
        with monkeypatch.context() as patch:
            patch.setattr(executor, "answer", broken)
            node.give(an_order())
            reply = node.reply()
        assert str(reply.error.reason) == "MemoryError: no memory"
        until(lambda: own.told.orders == 1)
        # The next one is carried out, as far as an order of no backbone goes.
        node.give(an_order())
        fault = messages.fault_of(node.reply())
        assert fault is not None
        assert fault.kind in ("ConfigError", "BackboneError")
        until(lambda: own.told.orders == 2)


# What ends.


def test_a_run_that_is_over_is_dropped_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    working_until_cancelled(monkeypatch)
    over = threading.Event()
    asked = []

    def is_over(run: int, node: int) -> bool:
        asked.append((run, node))
        return over.is_set()

    with supernode({"site": "a"}) as node, running(node, over=is_over) as own:
        node.give(an_order("line-a", 3))
        until(lambda: own.told.state == "working" and asked)
        assert (own.told.run, own.told.round, own.told.detail) == (
            "line-a",
            3,
            "run line-a: train, round 3",
        )
        over.set()
        fault = messages.fault_of(node.reply())
    assert fault is not None
    assert fault.message == "its run is over"
    assert set(asked) == {(11, 22)}


def test_heartbeats_keep_a_task_and_a_task_that_is_gone_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working_until_cancelled(monkeypatch)
    with supernode({"site": "a"}) as node, running(node) as own:
        node.give(an_order())
        until(lambda: own.told.state == "working")
        (record,) = node.state.task_token_store.values()
        before = record.active_until
        until(lambda: record.active_until > before)
        (task,) = node.state.task_store
        node.state.finish_task(task, "failed", "taken back")
        until(lambda: own.told.state == "idle")
        assert "has forgotten this order" in own.told.last_error


def test_the_stop_of_the_process_drops_the_order_and_tells_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    working_until_cancelled(monkeypatch)
    note = tmp_path / "run" / "order"
    with supernode({"site": "a"}) as node:
        with running(node, note=note) as own:
            node.give(an_order())
            until(lambda: own.told.state == "working")
            assert note.stat().st_mode & 0o777 == 0o600
        fault = messages.fault_of(node.reply())
        assert not note.exists()
    assert fault is not None
    assert fault.message == "the site's runtime is being stopped"


def test_a_step_that_does_not_end_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(message: Message, context: Context, runtime: Any, **hooks: Any) -> Message:
        hooks["begins"](messages.read(message.content, messages.ORDER, Order))
        release.wait(20)
        return Message(RecordDict({}), reply_to=message)

    monkeypatch.setattr(executor, "answer", stuck)
    with supernode({"site": "a"}) as node, running(node) as own:
        node.give(an_order())
        until(lambda: own.told.state == "working")
        own.abandon()
        assert str(node.reply().error.reason) == "the site's runtime is being stopped"
        release.set()
        until(lambda: own.told.state == "idle")
        assert node.state.get_messages_legacy(is_reply=True) == []


class Killed(BaseException):
    """As SIGKILL: nothing in the way handles it."""


def test_the_next_executor_speaks_for_one_that_died(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: Any, **__: Any) -> Message:
        raise Killed

    note = tmp_path / "order"
    with supernode({"site": "a"}) as node:
        with (
            monkeypatch.context() as patch,
            Executor(node.address, SECRET, new_runtime(), note=note) as own,
        ):
            patch.setattr(executor, "answer", killed)
            node.give(an_order())
            with pytest.raises(Killed):
                own.run(threading.Event())
        assert note.exists()
        with running(node, note=note) as own:
            fault = messages.fault_of(node.reply())
            until(lambda: own.told.state == "idle")
            assert "ended while it worked on this order" in own.told.last_error
        assert not note.exists()
    assert fault is not None
    assert "ended while it worked on this order" in fault.message


@pytest.mark.parametrize(
    "left", [b"", b"{", b'{"token": "x", "message": "AAAA"}', b'{"token": 1}', b"\xff" * 100]
)
def test_a_note_that_says_nothing_is_dropped(left: bytes, tmp_path: Path) -> None:
    note = tmp_path / "order"
    note.write_bytes(left)
    with supernode({"site": "a"}) as node, running(node, note=note) as own:
        until(lambda: own.told.state == "idle")
        assert not note.exists()


def test_without_heartbeats_the_supernode_itself_tells_the_run() -> None:
    """What is left where no executor comes back: a minute later the SuperNode answers."""
    with supernode({"site": "a"}) as node, flower_runtime.RuntimeApi(node.address, SECRET) as api:
        node.give(an_order())
        claim = api.acquire()
        assert claim is not None
        with claim:
            claim.pull()
        (record,) = node.state.task_token_store.values()
        record.active_until = record.active_until.replace(year=2000)
        assert str(node.reply().error.reason) == "ClientApp stopped responding."


def test_an_answer_is_handed_over_again_but_never_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is cut costs time; a second reply would pass for the answer to the SuperNode's next message."""
    push, finish = flower_runtime.Claim.push, flower_runtime.Claim.finish
    pushed: list[bool] = []

    def cut_once(claim: flower_runtime.Claim, reply: Message) -> None:
        pushed.append(len(pushed) > 0)
        if not pushed[-1]:
            raise SuperNodeError("cut")
        push(claim, reply)

    def cut(claim: flower_runtime.Claim, failed: str = "") -> None:
        finish(claim, failed)
        raise SuperNodeError("cut")

    monkeypatch.setattr(flower_runtime.Claim, "push", cut_once)
    monkeypatch.setattr(flower_runtime.Claim, "finish", cut)
    with supernode({"site": "a"}) as node, running(node) as own:
        node.give(an_order())
        assert messages.fault_of(node.reply()) is not None
        until(lambda: own.told.orders == 1)
        assert pushed == [False, True]
        assert node.state.get_messages_legacy(is_reply=True) == []


def test_a_supernode_that_comes_late_or_again_is_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedsplit")
    port = free_port()
    away = SuperNode({"site": "a"}, port=port)
    away.close()
    with running(away) as own:
        until(lambda: own.told.last_error)
        assert own.told.state == "starting"
        with supernode({"site": "a"}, port=port) as node:
            node.give(asking(RecordDict({})))
            assert node.reply().has_error()
        until(lambda: own.told.state == "failing")
        assert f"no SuperNode answers at 127.0.0.1:{port}" in own.told.detail
        with supernode({"site": "a"}, port=port):
            until(lambda: own.told.state == "idle")
            # Once each time, however often it was tried.
            assert caplog.text.count("it is tried again") == 2
            assert caplog.text.count("answers\n") == 2


# What is refused.


def test_another_secret_is_refused_and_none_is_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = []
    pull = flower_runtime.Claim.pull

    def seen(claim: flower_runtime.Claim) -> flower_runtime.Work:
        tokens.append(claim._token)
        return pull(claim)

    monkeypatch.setattr(flower_runtime.Claim, "pull", seen)
    with supernode({"site": "a"}) as node:
        with (
            Executor(node.address, b"guessed", new_runtime()) as own,
            pytest.raises(ConfigError, match="refuses the executor's secret; start both with"),
        ):
            own.run(threading.Event())
        with running(node):
            node.give(asking(RecordDict({})))
            node.reply()
    for secret in ("guessed", SECRET.decode(), *tokens):
        assert secret not in caplog.text
    assert len(tokens) == 1


def test_a_superlink_that_does_not_answer_ends_no_run(tmp_path: Path) -> None:
    key = tmp_path / "node-key"
    key.write_bytes(pki.new_node_key()[0])
    with executor.runs_of(f"127.0.0.1:{free_port()}", key, None) as runs:
        assert runs.over(1, 2) is False
    key.write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    with pytest.raises(ConfigError, match="cannot be read"):
        executor.runs_of("127.0.0.1:1", key, None)
    key.write_bytes(pki.new_node_key()[0])
    (tmp_path / "ca").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"certificate .* cannot be used"):
        executor.runs_of("127.0.0.1:1", key, tmp_path / "ca")


def test_only_this_machine_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:PORT"):
        Executor("192.0.2.1:9094", SECRET, new_runtime())


@pytest.mark.parametrize("name", ["AcquireTask", "PullTaskInput"])
def test_a_flower_with_other_names_is_refused_with_a_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flower_runtime.misfits() == []
    monkeypatch.delattr(flower_runtime.RuntimeHttpClient, name)
    with pytest.raises(
        ConfigError, match=rf"RuntimeHttpClient\.{name}.*without --isolation process"
    ):
        Executor("127.0.0.1:1", SECRET, new_runtime())


def test_a_flower_without_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fedsplit.federation.flower_runtime")
    monkeypatch.setitem(__import__("sys").modules, "fedsplit.federation.flower_runtime", None)
    with pytest.raises(ConfigError, match="which works and is slow"):
        Executor("127.0.0.1:1", SECRET, new_runtime())
