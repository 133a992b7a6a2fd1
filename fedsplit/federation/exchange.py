"""Sends messages to sites and yields their replies as they come, until a deadline.

Flower's own `send_and_receive` sleeps 3 s between polls and returns everything at the end; a short poll of
ours saves up to 3 s a round and lets metrics appear as sites finish.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

POLL_S = 0.2


def exchange(
    grid: Grid, orders: Mapping[str, Message], *, deadline_s: float
) -> Iterator[tuple[str, Message]]:
    """(site, reply) for each of `orders` (site -> message) that is answered before the deadline.

    A site that Flower no longer knows, or that misses the deadline, is simply not among them.
    """
    waiting: dict[str, str] = {}
    for site, message in orders.items():
        # One push each: Flower drops messages to nodes that are gone without saying which.
        for message_id in grid.push_messages([message]):
            if message_id:
                waiting[message_id] = site
    end = time.monotonic() + deadline_s
    while waiting and time.monotonic() < end:
        # Only ids still outstanding: one that was pulled before comes back as an error.
        for reply in grid.pull_messages(list(waiting)):
            site_or_none = waiting.pop(reply.metadata.reply_to_message_id, None)
            if site_or_none is not None:
                yield site_or_none, reply
        if waiting:
            time.sleep(POLL_S)
