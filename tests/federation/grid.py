"""A Grid that runs the real ClientApp in this process: real orders, real sites, real gRPC streams, no Flower processes.

`tamper` lets a test stand for a broken or hostile site by changing its reply; `silent` sites never answer.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client_app.app import app as client_app

Tamper = Callable[[int, Message, Message], Message]


class InProcessGrid(Grid):
    """Nodes 1..n, each with its node config."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        *,
        tamper: Tamper | None = None,
        silent: Callable[[int, Message], bool] = lambda node, message: False,
    ) -> None:
        self.nodes = {i + 1: config for i, config in enumerate(nodes)}
        self.sent: list[Message] = []
        # What Flower's own engines set before they call an app.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
        self._tamper = tamper
        self._silent = silent
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._replies: dict[str, Future[Message]] = {}

    def close(self) -> None:
        self._pool.shutdown()

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            node = message.metadata.dst_node_id
            if not self._silent(node, message):
                self._replies[message.metadata.message_id] = self._pool.submit(
                    self._answer, node, message
                )
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [i for i in message_ids if i in self._replies and self._replies[i].done()]
        return [self._replies.pop(i).result() for i in done]

    def _answer(self, node: int, message: Message) -> Message:
        context = Context(
            run_id=1, node_id=node, node_config=self.nodes[node], state=RecordDict(), run_config={}
        )
        try:
            reply = client_app(message, context)
        except Exception as err:  # noqa: BLE001  (what Flower does with an app that raises)
            reply = Message(Error(code=1, reason=f"{type(err).__name__}: {err}"), reply_to=message)
        return self._tamper(node, message, reply) if self._tamper else reply
