"""A site's side of a Flower message: read the order, hand it to the site's runtime, answer.

Imports nothing of the server: no strategy, no encoder host, no gRPC server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.common.logger import LOGGER_NAME
from numpy.typing import NDArray

from fedsplit.core.errors import FedsplitError
from fedsplit.core.orders import NotHeld, Order, Outgoing, Shape
from fedsplit.federation import messages
from fedsplit.site.runtime import SiteRuntime
from fedsplit.site.time_limit import TimeLimit, never
from fedsplit.training.site_settings import SiteSettings


def new_runtime() -> SiteRuntime:
    """A runtime that tells what leaves its sites where people look: what Flower's logger says is in a SuperNode's output.

    In deployment it lives for one message.
    """
    return SiteRuntime(log=logging.getLogger(LOGGER_NAME), resident=False)


def _unheard(order: Order) -> None:
    """Nobody wants to know what is worked on."""


def answer(
    message: Message,
    context: Context,
    runtime: SiteRuntime,
    *,
    cancelled: Callable[[], str] = never,
    begins: Callable[[Order], None] = _unheard,
) -> Message:
    """Carry out the order of a message; a typed error becomes a reply that names it.

    `cancelled`: see TimeLimit. `begins` is told of the order before the work.
    """
    try:
        messages.check_version(message.content)
        order = messages.read(message.content, messages.ORDER, Order)
        begins(order)
        limit = TimeLimit(order.deadline_s, message.metadata.created_at, cancelled)
        # What waited behind another order for too long is not begun.
        limit.check()
        site = SiteSettings.from_node(context.node_config, node_id=context.node_id)
        came = _Received(message.content)
        told = runtime.carry_out(site, order, came, limit=limit, run_id=context.run_id)
    except FedsplitError as err:
        name = str(context.node_config.get("site", ""))
        if not name and "partition-id" in context.node_config:
            name = f"site-{context.node_config['partition-id']}"
        return messages.fault_reply(err, message, site=name)
    return Message(_content(told), reply_to=message)


class _Received:
    """The arrays of a Flower message: core.orders.Incoming."""

    def __init__(self, content: RecordDict) -> None:
        self._content = content

    @property
    def bytes(self) -> int:
        """Bytes of all of them."""
        return messages.array_bytes(self._content)

    def arrays(self, group: str, wanted: Mapping[str, Shape]) -> dict[str, NDArray[np.float32]]:
        """See core.orders.Incoming."""
        return messages.from_arrays(self._content, group, wanted)


def _content(told: Outgoing) -> RecordDict:
    part = messages.NOT_HELD if isinstance(told.part, NotHeld) else messages.ANSWER
    content = messages.write(part, told.part)
    for group, tensors in told.arrays.items():
        content[group] = messages.packed(tensors)
    return content
