"""The Runtime API of a real SuperNode, without its SuperLink: messages are put in and replies taken out by hand.

Used by load_once.py, and by the executor's tests.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedsplit.core.programs import free_port

SECRET = b"an executor's secret"
RUN, NODE = 11, 22


class SuperNode:
    """What a SuperNode with process isolation has: a state, and the Runtime API over it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        port: int = 0,
        secret: bytes | None = SECRET,
        app: tuple[str, str] = ("fedsplit/fedsplit", "0"),
        bundle: bytes = b"bundle",
    ) -> None:
        """`secret` None: any executor may come. `app`: its name and version, of which `bundle` is."""
        port = port or free_port()
        self.address = f"127.0.0.1:{port}"
        factory = NodeStateFactory(ObjectStoreFactory())
        self.state: Any = factory.state()
        self._store = factory.objectstore_factory.store()
        self._config, self._app, self._bundle = config, app, bundle
        settings = uvicorn.Config(
            create_app(factory, secret), port=port, log_level="error", ws="none", lifespan="off"
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def give(self, message: Message) -> str:
        """As start_client_internal.py does with what it pulled; the message's id."""
        fab = Fab(hashlib.sha256(self._bundle).hexdigest(), self._bundle, {})
        run = Run.create_empty(message.metadata.run_id)
        run.fab_id, run.fab_version = self._app
        run.fab_hash, run.series_id = fab.hash_str, 1
        node = message.metadata.dst_node_id
        context = Context(run.run_id, node, dict(self._config), RecordDict(), {})
        self.state.set_node_id(node)
        self.state.set_run_series_context(run.series_id, context)
        self.state.store_run(run)
        self.state.store_fab(fab)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.state.create_task(
            task_type=TaskType.CLIENT_APP, run_id=run.run_id, fab_hash=fab.hash_str
        )
        self._store.preregister(run.run_id, get_object_tree(message))
        self.state.store_message(remove_content_from_message(message))
        for key, value in get_all_nested_objects(message).items():
            self._store.put(key, value.deflate())
        return str(message.metadata.message_id)

    def reply(self, timeout_s: float = 30.0) -> Message:
        """The next reply, whole."""
        end = time.monotonic() + timeout_s
        while not (found := self.state.get_messages_legacy(is_reply=True)):
            assert time.monotonic() < end, f"no reply within {timeout_s:g} s"
            time.sleep(0.02)
        (head,) = found
        number = head.metadata.message_id
        tree = self._store.get_object_tree(number)
        contents = {}
        for key in _ids(tree):
            while (content := self._store.get(key)) == b"":
                time.sleep(0.01)
            contents[key] = content
        reply = inflate_object_from_contents(number, contents)
        assert isinstance(reply, Message)
        reply.metadata.__dict__["_message_id"] = number
        self.state.delete_messages(message_ids=[number, head.metadata.reply_to_message_id])
        self._store.delete(number)
        return reply


def _ids(tree: Any) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _ids(child)


def asking(content: RecordDict, kind: str = "train") -> Message:
    """A message as a SuperLink hands it to node NODE in run RUN."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, 1, 1
    return Message(content, dst_node_id=NODE, message_type=kind)


@contextmanager
def supernode(config: Mapping[str, Any], **other: Any) -> Iterator[SuperNode]:
    """A SuperNode while inside; see there for `other`."""
    node = SuperNode(config, **other)
    try:
        yield node
    finally:
        node.close()
