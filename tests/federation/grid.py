"""The in-process grid as tests want it: through the real ClientApp, with hooks for what goes wrong.

`tamper` lets a test stand for a broken or hostile site by changing its reply; `silent` sites never answer; one that
`leaves` signs off as it is sent a message, and Flower answers for it. All are told the site's place, from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message

from client_app.app import app as client_app
from fedsplit.federation.engine import in_process

Tamper = Callable[[int, Message, Message], Message]


class InProcessGrid(in_process.InProcessGrid):
    """Nodes 101..., each with its node config; `sent` is every message that was pushed."""

    def __init__(
        self,
        nodes: list[dict[str, Any]],
        *,
        tamper: Tamper | None = None,
        silent: Callable[[int, Message], bool] = lambda node, message: False,
        leaves: Callable[[int, Message], bool] = lambda node, message: False,
        workers: int = 2,
    ) -> None:
        super().__init__(nodes, self._site, workers=workers)
        self.sent: list[Message] = []
        self._numbers = list(self.nodes)
        self._tamper = tamper
        self._silent = silent
        self._leaves = leaves

    def leave(self, place: int) -> dict[str, Any]:
        """The node signs off; what it was."""
        return self.nodes.pop(self._numbers[place - 1])

    def join(self, config: dict[str, Any]) -> int:
        """A node with a number that was not there before; its place."""
        self._numbers.append(self._numbers[-1] + 1)
        self.nodes[self._numbers[-1]] = config
        return len(self._numbers)

    def place(self, message: Message) -> int:
        """The place of the node that a message is for."""
        return self._numbers.index(message.metadata.dst_node_id) + 1

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.sent += messages
        for message_id, message in zip(ids, messages, strict=True):
            if self._leaves(self.place(message), message):
                self.nodes.pop(message.metadata.dst_node_id, None)
            if self._silent(self.place(message), message):
                del self._waiting[message_id]
        return ids

    def _site(self, message: Message, context: Context) -> Message:
        try:
            reply = client_app(message, context)
        except Exception as err:  # noqa: BLE001  (tamper sees the crash of an app as its peer would)
            reply = in_process.crash(err, message)
        return self._tamper(self.place(message), message, reply) if self._tamper else reply
