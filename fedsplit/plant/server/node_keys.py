"""Keeps the SuperLink's node keys equal to the registry's: at a change at once, and else by looking every minute.

The registry is what counts. A SuperLink with a new database gets every member's key; a key that was revoked while it was
down is taken away; so is one that somebody put in by hand, since nobody would ever revoke it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fedsplit.core.errors import EnrolmentError, FederationError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.throttle import Throttle, ThrottledWarnings
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.runs import present

if TYPE_CHECKING:
    # It needs flwr, which takes a second to load.
    from fedsplit.federation.control import FlowerControl

log = logging.getLogger(__name__)
log.addFilter(ThrottledWarnings(Throttle(most=1, every_s=600.0)))

EVERY_S = 60.0
YOUNG_S = 600.0
"""A key that the registry does not know may be of a join that has just been made."""
_START_S = 2.0


def of_folder(folder: FederationFolder) -> FlowerControl:
    """The keys of the SuperLink that is up in a folder. Raises FederationError where none is."""
    from fedsplit.federation.control import FlowerControl

    return FlowerControl(f"127.0.0.1:{present(folder).port('superlink')}", folder.ca)


class NodeKeys:
    """The SuperLink's keys, for the registry's sake."""

    def __init__(
        self, folder: FederationFolder, registry: Registry, connect: Callable[[], FlowerControl]
    ) -> None:
        self._folder, self._registry, self._connect = folder, registry, connect

    def register(self, public_key: str, name: str) -> None:
        """Let a key in. Raises FederationError where the SuperLink is down, EnrolmentError for a key that was in once."""
        with self._connect() as keys:
            keys.register(public_key, name)

    def forget(self, public_keys: Iterable[str]) -> bool:
        """Take keys away; False where the SuperLink is down: then they go when it is up again."""
        try:
            with self._connect() as keys:
                for key in public_keys:
                    keys.unregister(key)
        except FederationError as err:
            log.warning("node keys are taken away later: %s", err)
            return False
        return True

    def reconcile(self) -> None:
        """Make the SuperLink's keys those of the registry. Raises FederationError."""
        with self._connect() as keys:
            known = {node.public_key: node for node in keys.nodes() if not node.gone}
            wanted = self._registry.node_keys()
            for key in wanted.keys() - known.keys():
                self._add(keys, key, wanted[key])
            ceased = self._registry.ceased_node_keys()
            for key in known.keys() - wanted.keys():
                if key in ceased or time.time() - known[key].registered > YOUNG_S:
                    keys.unregister(key)
                    audit.record(
                        self._folder, "node-key-removed", "server", key=key, known=key in ceased
                    )

    def watch(self, stop: threading.Event) -> None:
        """Reconcile until `stop`: at first until it has worked once, then every minute."""
        pause = _START_S
        while not stop.wait(pause):
            try:
                self.reconcile()
                pause = EVERY_S
            except FedsplitError as err:
                log.warning("node keys are not compared with the SuperLink's: %s", err)

    def _add(self, keys: FlowerControl, key: str, name: str) -> None:
        try:
            keys.register(key, name)
        except EnrolmentError:
            log.warning(
                "somebody has taken the node key of site %s away in Flower, for good; give it new keys with "
                "`fedsplit federation rotate`",
                printable(name),
            )
        else:
            audit.record(self._folder, "node-key-added", name, key=key)
