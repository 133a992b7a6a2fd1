"""How long a site may work on an order: what comes after the round's deadline, or its run's end, counts for nothing.

Whoever hands a site its orders makes one an order; the batches of work.py are its clock. Simulated sites have no
limit of their own: that one is late there says something of the machine, not of the site.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fedsplit.core.errors import FederationError
from fedsplit.training import data


def never() -> str:
    """Nobody takes the order back."""
    return ""


@dataclass
class TimeLimit:
    """Ends an order's work, between two steps, once its answer would come too late or to nobody."""

    deadline_s: float = 0.0
    """Seconds from the order's making; 0: no limit."""
    made: float = 0.0
    """When the server made the order, by the server's clock."""
    cancelled: Callable[[], str] = never
    """Why the order is to be dropped, a sentence; empty while it is not. Asked before each batch."""
    planned: int = 0
    """Samples that will pass in all, as far as it is known."""
    passed: int = 0
    """Samples that have passed."""
    _began: float = field(default_factory=time.monotonic)
    _first_s: float | None = None
    """Age at the first batch."""

    @property
    def age_s(self) -> float:
        """How old the order is. Where this machine's clock is behind the server's, since it is worked on here."""
        return max(time.time() - self.made, time.monotonic() - self._began)

    def check(self) -> None:
        """Raise FederationError once the time is over, or the order is taken back."""
        if why := self.cancelled():
            raise FederationError(why)
        if not self.deadline_s or (age := self.age_s) < self.deadline_s:
            return
        what = "raise deadline-s, or give the site less to do (local-epochs, samples, cut)"
        if self._first_s is None:
            raise FederationError(
                f"its order was {age:.0f} s old before it could begin, deadline-s={self.deadline_s:g}; {what}"
            )
        share = min(1.0, self.passed / self.planned) if self.planned else 0.0
        needs = f"more than {age:.0f}"
        if share > 0:
            needs = f"about {self._first_s + (age - self._first_s) / share:.0f}"
        raise FederationError(
            f"it needs {needs} s for the order, deadline-s={self.deadline_s:g}; {what}"
        )

    def timed(self, batches: Iterable[data.Batch]) -> Iterator[data.Batch]:
        """The same batches, as long as there is time."""
        for batch in batches:
            if self._first_s is None:
                self._first_s = self.age_s
            self.check()
            yield batch
            self.passed += len(batch.labels)
