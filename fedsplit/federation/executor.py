"""A site's resident executor: one process that carries out every order of its SuperNode, for years.

The SuperNode runs with `--isolation process`; `Executor.run` takes its tasks one at a time and hands each message to
site.py's `answer`, which works on a `SiteRuntime` that stays. What today's way starts anew for each message (Python,
torch, the backbone, the data) is here already. flower_runtime.py speaks with the SuperNode; plant/site/runtime.py is
the process.

Nobody is left waiting: a task has heartbeats while it is worked on; an order is dropped between two steps once its run
is over, its SuperNode has forgotten it or this process is to end; and an executor that died is spoken for by the next
one, which finds the order in the note that it left.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from flwr.app import Message

from fedsplit import __version__
from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, SuperNodeError
from fedsplit.core.foreign import printable
from fedsplit.core.orders import Order
from fedsplit.federation import messages
from fedsplit.federation.at_hand import STOPPING, Note, Over, Watch
from fedsplit.federation.site import answer
from fedsplit.site.runtime import SiteRuntime

if TYPE_CHECKING:
    from fedsplit.federation.flower_runtime import Claim, Runs, Work

log = logging.getLogger(__name__)

# A SuperNode looks for messages every 3 s by itself: what a task waits here is little beside that.
POLL_S = 0.2
# Where no order has come for a while, a second does: each look costs a device some CPU.
QUIET_AFTER_S, QUIET_POLL_S = 120.0, 1.0
_BACK_OFF_S = 10.0
_PUSH_TRIES = 6
_KINDS = ("query", "train", "evaluate")
_DIED = (
    "the site's runtime process ended while it worked on this order (killed, or out of memory) and has been started "
    "again"
)


@dataclass(frozen=True)
class Doing:
    """What an executor does."""

    state: Literal["starting", "idle", "working", "failing"] = "starting"
    detail: str = ""
    """What it works on, or why it fails."""
    run: str = ""
    round: int = 0
    since: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    until: float = 0.0
    """When the order that it works on counts for nothing any more, in seconds since the epoch; 0: never."""
    orders: int = 0
    """Orders that were answered since the process started."""
    last_error: str = ""


class Executor(Closing):
    """Takes the tasks of the SuperNode at `address` (HOST:PORT of its Runtime API, on this machine).

    Raises ConfigError where the installed Flower is not one that this executor knows, or `address` is elsewhere.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        runtime: SiteRuntime,
        *,
        note: Path | None = None,
        over: Over | None = None,
    ) -> None:
        """`note`: a file for what is worked on, so that the next executor can speak for one that died."""
        if address.rpartition(":")[0] not in ("127.0.0.1", "localhost", "[::1]"):
            raise ConfigError(
                f"the SuperNode's address is {printable(address)}; an executor takes tasks on its own machine alone, for "
                f"they come without TLS: give 127.0.0.1:PORT"
            )
        self._flower = _flower_runtime()
        self._api = self._flower.RuntimeApi(address, secret)
        self._address, self._runtime, self._over = address, runtime, over or _not_known
        self._note = Note(note)
        self._told = Doing()
        self._last_order = time.monotonic()
        self._away_s = 0.0
        self._lock = threading.Lock()
        self._at_work: tuple[Claim, Message] | None = None

    @property
    def told(self) -> Doing:
        """What it does now. May be asked from any thread."""
        return self._told

    def run(self, stop: threading.Event) -> None:
        """Take and answer tasks until `stop` is set. Raises ConfigError where the SuperNode refuses this executor."""
        while not stop.is_set():
            try:
                self._speak_for_the_dead()
                claim = self._api.acquire()
            except SuperNodeError as err:
                self._is_away(err)
                stop.wait(self._away_s)
                continue
            self._is_there()
            if claim is None:
                stop.wait(self._poll_s())
                continue
            with claim:
                self._work(claim, stop)

    def tell_of_the_dead(self) -> None:
        """Answer the order over which the executor before this one died, if that can be done now; else `run` does."""
        with contextlib.suppress(SuperNodeError):
            self._speak_for_the_dead()

    def abandon(self) -> None:
        """Tell the run, from another thread, that the order at hand will not be answered. The process ends after it."""
        with self._lock:
            at_work, self._at_work = self._at_work, None
            if at_work is None:
                return
            claim, message = at_work
            try:
                claim.push(self._flower.crashed(STOPPING, message))
            except SuperNodeError as err:
                log.warning("the run was not told that its order is abandoned: %s", err)
                return
            self._end(claim, STOPPING)

    def close(self) -> None:
        """Close the connection to the SuperNode."""
        self._api.close()

    def _work(self, claim: Claim, stop: threading.Event) -> None:
        self._last_order = time.monotonic()
        try:
            work = claim.pull()
        except SuperNodeError as err:
            # Nothing is known that could be answered; without heartbeats the SuperNode tells the run itself.
            self._failed(f"an order could not be taken: {err}")
            return
        with self._lock:
            self._at_work = claim, work.message
        self._note.write(claim.note(work.message))
        with Watch(claim, work, self._over, stop) as watch:
            reply, failed = self._answer(work, watch.cancelled)
            self._hand_over(claim, reply, failed, stop)
        self._last_order = time.monotonic()
        self._told = replace(
            self._told, state="idle", detail="", since=time.time(), until=0.0,
            orders=self._told.orders + 1,
        )  # fmt: skip

    def _answer(self, work: Work, cancelled: Callable[[], str]) -> tuple[Message, str]:
        """The reply, and why the task failed, if it did."""
        if foreign := _foreign(work):
            self._failed(foreign)
            return self._flower.crashed(foreign, work.message), foreign
        try:
            reply = answer(
                work.message, work.context, self._runtime, cancelled=cancelled, begins=self._begins
            )
        except Exception as err:
            # A bug, or no memory. It costs this order; the next one may well be carried out.
            log.exception("an order could not be carried out")
            reason = f"{type(err).__name__}: {printable(err)}"
            self._failed(reason)
            return self._flower.crashed(reason, work.message), reason
        if (fault := messages.fault_of(reply)) is not None:
            self._failed(f"{fault.kind}: {fault.message}")
        return reply, ""

    def _begins(self, order: Order) -> None:
        what = order.kind if order.round == 0 else f"{order.kind}, round {order.round}"
        self._told = replace(
            self._told, state="working", run=order.run, round=order.round, since=time.time(),
            until=time.time() + order.deadline_s if order.deadline_s else 0.0,
            detail=printable(f"run {order.run}: {what}"),
        )  # fmt: skip
        log.info("run %s: %s", printable(order.run), what)

    def _hand_over(self, claim: Claim, reply: Message, failed: str, stop: threading.Event) -> None:
        """Push the reply, again where that fails for a reason that may pass."""
        for again in range(_PUSH_TRIES):
            with self._lock:
                if self._at_work is None:  # abandoned
                    return
                try:
                    claim.push(reply)
                except SuperNodeError as err:
                    why = err
                else:
                    self._end(claim, failed)
                    return
            if why.lost:
                break
            stop.wait(0.5 * 2**again)
        # Whoever is left to wait hears of it from the SuperNode, as soon as the heartbeats have stopped for a minute.
        with self._lock:
            self._at_work = None
            self._note.drop()
        self._failed(f"an answer could not be handed over: {why}")

    def _end(self, claim: Claim, failed: str) -> None:
        """The reply is with the SuperNode. A second one would pass for the answer to its next message."""
        self._at_work = None
        self._note.drop()
        try:
            claim.finish(failed)
        except SuperNodeError as err:
            log.warning("the SuperNode was not told that an order is done: %s", err)

    def _speak_for_the_dead(self) -> None:
        """Answer the order over which the executor before this one died, once."""
        if self._told.state != "starting" or (note := self._note.read()) is None:
            return
        if (left := self._flower.left_behind(self._address, note)) is not None:
            claim, message = left
            with claim:
                try:
                    claim.push(self._flower.crashed(_DIED, message))
                except SuperNodeError as err:
                    if not err.lost:
                        raise
                else:
                    self._failed(_DIED)
                    self._end(claim, _DIED)
        self._note.drop()

    def _failed(self, why: str) -> None:
        log.error("%s", printable(why, limit=2000))
        self._told = replace(self._told, last_error=printable(why))

    def _is_away(self, err: SuperNodeError) -> None:
        if not self._away_s:
            log.warning("%s; it is tried again", err)
        self._away_s = min(_BACK_OFF_S, self._away_s * 2 or POLL_S)
        if self._told.state != "failing":
            # `starting` lasts until the SuperNode has answered once: the order of a dead executor may wait there.
            state: Literal["starting", "failing"] = (
                "starting" if self._told.state == "starting" else "failing"
            )
            self._told = replace(
                self._told, state=state, detail=printable(err), last_error=printable(err)
            )

    def _is_there(self) -> None:
        if self._away_s:
            log.info("the SuperNode at %s answers", self._address)
            self._away_s = 0.0
        if self._told.state in ("starting", "failing"):
            self._told = replace(self._told, state="idle", detail="", since=time.time())

    def _poll_s(self) -> float:
        quiet = time.monotonic() - self._last_order > QUIET_AFTER_S
        return QUIET_POLL_S if quiet else POLL_S


def runs_of(superlink: str, node_key: Path, ca: Path | None) -> Runs:
    """What tells an executor that a run is over; its arguments are those of the SuperNode. Raises ConfigError."""
    runs: Runs = _flower_runtime().Runs(superlink, node_key, ca)
    return runs


def _not_known(*_run_and_node: int) -> bool:
    """Whoever has no node key cannot ask whether a run is over."""
    return False


def _foreign(work: Work) -> str:
    """Why a message is none of fedsplit's; empty where it is."""
    kind, message = work.message.metadata.message_type, work.message
    order = message.has_content() and messages.ORDER in message.content.config_records
    if order and kind.split(".")[0] in _KINDS:
        return ""
    return (
        f"this site carries out the orders of fedsplit {__version__}, which is installed there, and installs no other app: a "
        f"{printable(kind, limit=60)!r} message of the app {work.app or '(without a name)'} is no such order"
    )


def _flower_runtime() -> ModuleType:
    """The module with Flower's private names. Raises ConfigError where the installed Flower has others."""
    try:
        from fedsplit.federation import flower_runtime

        missing = flower_runtime.misfits()
    except (ImportError, AttributeError, TypeError) as err:
        missing = [str(err)]
    if missing:
        raise ConfigError(
            f"the resident executor does not know flwr {importlib.metadata.version('flwr')} ({printable('; '.join(missing))}); "
            f"install one that fedsplit asks for, or start the SuperNode without --isolation process: then each message "
            f"starts a process of its own, which works and is slow"
        )
    return flower_runtime
