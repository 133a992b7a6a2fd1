"""The in-process grid: lazy, and in bounded memory. tests/system/test_simulation.py: the same module as Flower's own."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.exchange import gone


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
        (node,) = site.nodes
        assert first.content["n"]["n"] == 0
        assert first.metadata.reply_to_message_id == ids[0]
        assert first.metadata.src_node_id == node
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


def test_numbers_are_never_flowers_own_and_a_node_that_left_gets_its_error() -> None:
    with InProcessGrid(nodes(3), Site()) as grid:
        assert not {0, SUPERLINK_NODE_ID} & set(grid.get_node_ids())
        messages = orders(grid)
        del grid.nodes[messages[1].metadata.dst_node_id]
        ids = list(grid.push_messages(messages))
        replies = {r.metadata.reply_to_message_id: r for r in grid.pull_messages(ids)}
    assert [replies[i].has_error() for i in ids] == [False, True, False]
    assert replies[ids[1]].metadata.src_node_id == SUPERLINK_NODE_ID
    assert gone(replies[ids[1]])


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
