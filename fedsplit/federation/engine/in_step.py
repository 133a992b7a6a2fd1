"""Works on several calls by turns, one at a time and always in the same order: what sites do at once, repeatably.

Each call has a thread, and one of them works at any moment: until it says `pause` or is done. So
the outcome does not hang on the machine's speed, as it does where threads run freely.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a call that nobody waits for any more; no handler of errors may catch it."""


class InStep(Generic[T]):
    """`start` calls, take what they return from `next_done`. Those calls say `pause` where the others may go on.

    A call that pauses must not hold a lock that another may want.
    """

    def __init__(self) -> None:
        self._calls: deque[_Call[T]] = deque()
        """The first one goes on next."""
        self._mine = threading.local()

    def __len__(self) -> int:
        """Calls that are not done."""
        return len(self._calls)

    def start(self, work: Callable[[], T]) -> None:
        """Put a call behind the others; it begins when it is its turn."""
        self._calls.append(_Call(work, self._mine))

    def next_done(self) -> T:
        """Let the calls work by turns until one is done, and return or raise what that one did."""
        while True:
            call = self._calls[0]
            call.go_on()
            self._calls.rotate(-1)
            if call.done:
                self._calls.pop()
                return call.result()

    def pause(self) -> None:
        """Let the others go on; at once back where no call of `start` says it."""
        call: _Call[T] | None = getattr(self._mine, "call", None)
        if call is not None:
            call.wait()

    def close(self) -> None:
        """End what is not done, where it next pauses."""
        while self._calls:
            self._calls.popleft().stop()


class _Call(Generic[T]):
    def __init__(self, work: Callable[[], T], mine: threading.local) -> None:
        self.done = False
        self._work, self._mine = work, mine
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopped = False
        self._result: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="site", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it work until it pauses or is done."""
        self._go.release()
        self._back.acquire()

    def wait(self) -> None:
        """Its own thread: give way until `go_on`."""
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped

    def result(self) -> T:
        """What it returned; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> None:
        """Let it unwind, and wait for its thread."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        self._mine.call = self
        try:
            if not self._stopped:
                self._result = self._work()
        except BaseException as err:  # noqa: BLE001 - handed to who waits for it
            self._error = err
        finally:
            self.done = True
            self._back.release()
