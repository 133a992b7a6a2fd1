"""A Grid that runs the sites in this process: the real orders and the real sites, no Flower processes.

For many small runs, which would each pay a simulation engine's start of seconds. `server.Run`
drives it like any other Grid, and `answer` is `site.answer` or whatever the caller wraps around it.
It adds no deadline of its own: with one worker no site is ever late, however slow the machine.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.core.closing import Closing
from fedsplit.federation.engine.in_step import InStep

NodeConfig = Mapping[str, str | int | float | bool]
Handler = Callable[[Message, Context], Message]

# How long a pull waits for a worker before the caller may look at its own deadline.
_LOOK_S = 0.5
# As Flower's numbers are: never 0, and never the 1 from which Flower answers for nodes that are gone.
_FIRST_NODE = 101


class InProcessGrid(Closing, Grid):
    """Nodes 101..., each with its node config. Use it in a `with`, or `close` it.

    A message waits as it was pushed, and its reply is computed when it is pulled: as many replies exist as
    the caller keeps. With one worker the puller's own thread works; with more, a pool of that many, or, `in_step`, as many
    sites by turns, which repeats bit for bit.
    """

    def __init__(
        self,
        nodes: Sequence[NodeConfig],
        answer: Handler,
        *,
        workers: int = 1,
        torch_threads: int = 0,
        in_step: InStep[Message] | None = None,
    ) -> None:
        """`torch_threads`: of each worker of a pool; 0 leaves torch's own choice. Who gives `in_step` has the sites pause it."""
        self.nodes = {_FIRST_NODE + i: dict(config) for i, config in enumerate(nodes)}
        self._answer = answer
        self._workers = workers
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._running: dict[str, Future[Message]] = {}
        self._pool = None
        self._in_step = in_step
        if workers > 1 and in_step is None:

            def start() -> None:
                if torch_threads:
                    torch.set_num_threads(torch_threads)

            self._pool = ThreadPoolExecutor(workers, "site", initializer=start)
        self._closed = False
        # Another one for each run, as Flower gives them: sites tell runs apart by it.
        self._run_id = uuid.uuid4().int & (2**63 - 1) or 1
        # What Flower's own engines set before they call an app.
        self._before = (TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    def close(self) -> None:
        """Wait for the sites that work and give Flower's identity back. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._in_step is not None:
            self._in_step.close()
        TaskIdentity._run_id, TaskIdentity._task_id, TaskIdentity._node_id = self._before

    def set_run(self, run: Run) -> None:
        """Not for this grid: it belongs to one run from the start."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Flower's description of the run, which does not exist here."""
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Flower's old way to make a message; `Message(...)` does it."""
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        """Not for this grid: `federation.server.exchange` pushes and pulls."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; those that a caller takes out of `nodes` or puts there have gone or come."""
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give each message an id and keep it until its reply is pulled."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
            self._waiting[message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Replies as they are made, each computed when the caller asks for the next one."""
        if self._in_step is not None:
            yield from self._pull_by_turns(list(message_ids), self._in_step)
        elif self._pool is None:
            for message_id in message_ids:
                message = self._waiting.pop(message_id, None)
                if message is not None:
                    yield self._reply(message)
        else:
            yield from self._pull_from_pool(list(message_ids), self._pool)

    def _pull_by_turns(self, ids: list[str], in_step: InStep[Message]) -> Iterator[Message]:
        """One reply, so that the caller may push the next message before the others go on."""
        threads = torch.get_num_threads()

        def reply(message: Message) -> Message:
            torch.set_num_threads(threads)
            return self._reply(message)

        for message_id in ids:
            if len(in_step) >= self._workers:
                break
            if (message := self._waiting.pop(message_id, None)) is not None:
                in_step.start(partial(reply, message))
        if len(in_step):
            yield in_step.next_done()

    def _pull_from_pool(self, ids: list[str], pool: ThreadPoolExecutor) -> Iterator[Message]:
        while True:
            for message_id in ids:
                if len(self._running) >= self._workers:
                    break
                if (message := self._waiting.pop(message_id, None)) is not None:
                    self._running[message_id] = pool.submit(self._reply, message)
            running = {self._running[i]: i for i in ids if i in self._running}
            if not running:
                return
            done, _ = wait(running, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
            if not done:
                return
            for future in done:
                del self._running[running[future]]
                yield future.result()

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return lost(message)
        context = Context(
            run_id=self._run_id,
            node_id=node,
            node_config=self.nodes[node],
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._answer(message, context)
        except Exception as err:  # noqa: BLE001 - what Flower does with an app that raises
            return crash(err, message)


def lost(message: Message) -> Message:
    """The reply that Flower's SuperLink makes for a node that is gone."""
    return create_message_error_unavailable_res_message(message.metadata, "node_unavail")


def crash(error: Exception, message: Message) -> Message:
    """The reply that Flower makes for an app that raised."""
    return Message(Error(code=1, reason=f"{type(error).__name__}: {error}"), reply_to=message)
