"""The in-process grid: lazy, in bounded memory, and the same module as Flower's own simulation."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from fedsplit.core.config import RunConfig
from fedsplit.federation.endpoint import hosted
from fedsplit.federation.in_process import InProcessGrid
from fedsplit.federation.server import Run
from fedsplit.federation.site import answer
from fedsplit.serving.process import hosting


class Site:
    """Counts its calls, and how many replies of it are alive."""

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.nodes.append(context.node_id)
        if context.node_config.get("bad"):
            raise RuntimeError("boom")
        number = int(context.node_config["partition-id"])
        return Message(RecordDict({"n": ConfigRecord({"n": number})}), reply_to=message)


def orders(grid: InProcessGrid) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


def nodes(count: int) -> list[dict[str, int]]:
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def test_a_reply_is_computed_when_it_is_pulled() -> None:
    site = Site()
    with InProcessGrid(nodes(50), site) as grid:
        ids = list(grid.push_messages(orders(grid)))
        assert site.nodes == []
        replies = iter(grid.pull_messages(ids))
        first = next(replies)
        assert site.nodes == [1]
        assert first.content["n"]["n"] == 0
        assert first.metadata.reply_to_message_id == ids[0]
        assert first.metadata.src_node_id == 1
        assert len(list(replies)) == 49
        assert list(grid.pull_messages(ids)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_all_answers_come_and_a_crash_is_one(workers: int) -> None:
    configs = [*nodes(7), {"bad": True}]
    with InProcessGrid(configs, Site(), workers=workers, torch_threads=1) as grid:
        ids = list(grid.push_messages(orders(grid)))
        replies = []
        while len(replies) < 8:
            replies += grid.pull_messages(ids)
    (crashed,) = [r for r in replies if r.has_error()]
    assert crashed.error.reason == "RuntimeError: boom"
    assert sorted(r.content["n"]["n"] for r in replies if not r.has_error()) == list(range(7))


def test_flowers_identity_is_given_back() -> None:
    before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
    try:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = 7, 8, 9
        grid = InProcessGrid(nodes(1), Site())
        assert TaskIdentity.run_id == 1
        grid.close()
        grid.close()
        assert (TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id) == (7, 8, 9)
    finally:
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_module_as_flwr_run(tmp_path: Path) -> None:
    """Bit for bit: the order of a site's batches and of the average is that of seeds and names."""
    from tests.system.test_simulation import ManagedSuperLink, wait_for_end

    flat = {"max-samples": 60, "rounds": 1, "partition": "iid", "cut": "1,5;0,6"}
    far = ManagedSuperLink(tmp_path / "home")
    far.env["OMP_NUM_THREADS"] = "1"
    try:
        text = " ".join(f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}" for k, v in flat.items())
        done = far.flwr("run", ".", "--run-config", f"{text} run-name='far' runs-dir='{tmp_path}'")
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for_end(tmp_path / "far")
    finally:
        for pid in far.alive():
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
    config = RunConfig.from_flat(flat | {"run-name": "near", "runs-dir": str(tmp_path)})
    with hosting(config, None) as (server, host, key):
        endpoint = hosted(
            config, address=server.address, key=key, publish=host.publish, collect=host.collect
        )
        with InProcessGrid(nodes(2), answer) as grid:
            Run(grid, config, endpoint, simulated=True).go()
    modules = [
        load_file(tmp_path / run / "module" / "adapter_model.safetensors")
        for run in ("far", "near")
    ]
    assert modules[0].keys() == modules[1].keys()
    different = [n for n in modules[0] if not np.array_equal(modules[0][n], modules[1][n])]
    assert different == []
