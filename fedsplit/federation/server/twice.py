"""A round that was lost is done once more before the run gives up: the encoder was restarted, all sites were cut off.

What the first time cost is not counted, what happened is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedsplit.core.errors import EncoderError, FederationError, RoundLostError
from fedsplit.core.notes import fit
from fedsplit.federation.server.attendance import Attendance
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.orders import Orders

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
        try:
            return work()
        except RoundLostError as err:
            first = err
        absences = self._begin_again(round_, first)
        try:
            return work()
        except (RoundLostError, EncoderError) as err:
            told = {(r, site) for r, site, _ in self._ledger.absences}
            self._ledger.absences += [a for a in absences if a[:2] not in told]
            if isinstance(err, RoundLostError):
                raise FederationError(f"{err} (it was done twice)") from err
            raise FederationError(f"{first}. It could not be done once more: {err}") from err

    def _begin_again(self, round_: int, lost: RoundLostError) -> list[tuple[int, str, str]]:
        """As if the round had not begun, but that it is told; the absences of the first time."""
        what = f"round {round_} is done once more" if round_ else "the start is done once more"
        note = f"{what}: {lost.why}"
        self._say(note)
        self._ledger.notes = fit([*self._ledger.notes, note])
        absences = self._ledger.forget(round_)
        self._run_dir.forget_after(round_ - 1)
        self._orders.begin_again(round_)
        config = self._orders.config
        self._attendance.wait_for(config.server.min_sites, timeout_s=config.server.deadline_s)
        return absences
