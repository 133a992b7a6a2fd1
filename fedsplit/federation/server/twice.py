"""A round that was lost is done once more before the run gives up: the encoder was restarted, all sites were cut off.

What the first time cost is not counted, what happened is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from fedsplit.core.errors import EncoderError, FederationError, RoundLostError
from fedsplit.federation.server.attendance import Attendance
from fedsplit.federation.server.books.ledger import Absence, Ledger
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.orders import Orders, round_name

T = TypeVar("T")


class Twice:
    """Does a round, and does it once more where it was lost for reasons that may pass."""

    def __init__(
        self,
        orders: Orders,
        *,
        attendance: Attendance,
        ledger: Ledger,
        run_dir: RunDir,
        on_update: Callable[[str], None],
    ) -> None:
        self._orders, self._attendance = orders, attendance
        self._ledger, self._run_dir = ledger, run_dir
        self._say = on_update

    def do(self, round_: int, work: Callable[[], T]) -> T:
        """What `work` returns, which publishes the round's version and sends its orders. Raises FederationError."""
        before = list(self._ledger.absences)
        try:
            return work()
        except RoundLostError as err:
            first = err
        absences = self._begin_again(round_, first, before)
        try:
            return work()
        except (RoundLostError, EncoderError) as err:
            told = {(r, site) for r, site, _ in self._ledger.absences}
            self._ledger.absences += [a for a in absences if a[:2] not in told]
            if isinstance(err, RoundLostError):
                raise FederationError(f"{err} (it was done twice)") from err
            raise FederationError(f"{first}. It could not be done once more: {err}") from err

    def _begin_again(
        self, round_: int, lost: RoundLostError, before: Sequence[Absence]
    ) -> list[Absence]:
        """As if the round had not begun, but that it is told; the absences of the first time, without those `before`."""
        note = f"{round_name(round_)} is done once more: {lost.why}"
        self._say(note)
        self._ledger.note(note)
        forgotten = self._ledger.forget(round_)
        # What comes before the first round is several steps, all of round 0.
        self._ledger.absences += [a for a in forgotten if a in before]
        self._run_dir.forget_after(round_ - 1)
        self._orders.begin_again(round_)
        config = self._orders.config
        self._attendance.wait_for(config.server.min_sites, timeout_s=config.server.deadline_s)
        return [a for a in forgotten if a not in before]
