"""What the sites of a run answer: awaited, read, checked, and noted as it comes, with who is left out and why.

How messages travel is exchange.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedsplit.core.aggregation import Update, check_update
from fedsplit.core.errors import (
    BackboneError,
    ConfigError,
    DataError,
    DivergedError,
    FederationError,
    FedsplitError,
    ProtocolError,
    RoundLostError,
    RunDirError,
    UpdateError,
)
from fedsplit.core.foreign import printable
from fedsplit.core.orders import DELTA, SCALARS, Answer, Calibration
from fedsplit.core.records import Phase, RoundMetrics, Status
from fedsplit.core.scores import fits
from fedsplit.federation import messages
from fedsplit.federation.server.attendance import Attendance
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.books.replay_log import Scalars
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.exchange import Post, exchange, expired, gone
from fedsplit.federation.server.orders import Orders, Site, round_name
from fedsplit.model.module import ModuleTensors
from fedsplit.training.rank_pruning import kept_rank
from fedsplit.training.replay import replayed, scalars_shape

# So many rounds after its own an answer is still listened for.
LATE_ROUNDS = 4
# What a site says that it would say again.
_LASTING = frozenset(kind.__name__ for kind in (BackboneError, ConfigError, DataError, RunDirError))


# A site's errors that a module of absurd values causes.
_STUCK = (DivergedError.__name__, ProtocolError.__name__)
_Measured = TypeVar("_Measured", Answer, Calibration)


class Replies:
    """The replies to a run's orders; metrics and absences go into the ledger and the run's folder."""

    def __init__(
        self,
        orders: Orders,
        *,
        attendance: Attendance,
        ledger: Ledger,
        run_dir: RunDir,
        window: int,
        on_update: Callable[[str], None],
    ) -> None:
        """`window`: orders that may be out at once."""
        self._orders = orders
        self._config = orders.config
        self._attendance = attendance
        self._by_order: dict[str, Site] = {}
        self._ledger = ledger
        self._run_dir = run_dir
        self.scoring = ledger.scoring
        """How the run's tests are scored."""
        self._window = window
        self._say = on_update
        self._replied: list[str] = []
        self._good: set[str] = set()
        self._may_pass = False
        """Was a site lost for a reason that may not last?"""
        self._late: list[tuple[int, float, Post[Site]]] = []
        """(round, its deadline, orders that nobody answered in time)."""
        self.pruned: dict[str, int] = {}
        """Ranks that sites have come down to in the round's updates, from the next round on."""
        self.stuck: set[str] = set()
        """Sites that could not train on what the round sent."""
        self.asked = 0
        """How many sites the round asked."""

    def awaited(
        self,
        grid: Grid,
        round_: int,
        orders: Iterable[Message],
        phase: Phase,
        *,
        again: Callable[[Site], Iterable[Message]],
        deadline_s: float | None = None,
    ) -> Iterator[Message]:
        """Send; note who answers and who does not, as it happens.

        `again` makes the order once more for a site that is back, as another node, before it has answered.
        """
        wait_s = deadline_s or self._config.server.deadline_s
        self._attendance.look()
        sites = {site.node_id: site for site in self._orders.sites}
        asked: list[str] = []

        def whose() -> Iterator[tuple[Site, Message]]:
            for order in orders:
                site = sites[order.metadata.dst_node_id]
                asked.append(site.name)
                self.asked += 1
                yield site, order

        def more() -> Iterable[tuple[Site, Message]]:
            self._hear_the_late()
            for site in self._attendance.look():
                if site.name in asked and site.name not in self._good:
                    # The order at its old node is nobody's any more.
                    post.out = {i: sent for i, sent in post.out.items() if sent.whose is not site}
                    self._ledger.back(round_, site.name)
                    yield from ((site, order) for order in again(site))

        self._replied, self.pruned, self._by_order, self._good = [], {}, {}, set()
        self._may_pass = False
        self.stuck, self.asked = set(), 0
        self._status(phase, round_)
        post = Post[Site](grid)
        came = exchange(post, whose(), deadline_s=wait_s, window=self._window, more=more)
        for site, reply in came:
            self._by_order[reply.metadata.reply_to_message_id] = site
            if (fault := messages.fault_of(reply)) is None:
                self._good.add(site.name)
            elif fault.kind not in _LASTING:
                self._may_pass = True
            if round_ > 0:
                self._note(round_, site.name, reply)
            if site.name not in self._replied:
                self._replied.append(site.name)
            self._status(phase, round_)
            yield reply
        silent = {sent.whose.name for sent in post.out.values()}
        # One that is back may be silent where the node that it was before had an answer, Flower's.
        for name in sorted((set(asked) - set(self._replied)) | (silent - self._good)):
            self._may_pass = True
            why = f"no answer within {wait_s:g} s" if name in silent else messages.SITE_GONE
            self.left_out(round_, name, why)
        if not self._orders.simulated:
            self._late.append((round_, wait_s, post))

    def _hear_the_late(self) -> None:
        """Say how late an answer is that came after its round's deadline; Flower forgets the order at last."""
        for round_, wait_s, post in self._late:
            for sent, reply in post.replies():
                if expired(reply):
                    continue
                fault = messages.fault_of(reply)
                late = f"its answer came after {sent.age_s:.0f} s, deadline-s={wait_s:g}; raise deadline-s"
                why = printable(fault.message if fault else late)
                self._ledger.explain(round_, sent.whose.name, why)
                self._say(f"{round_name(round_)}: {sent.whose.name} was late: {why}")
        self._late = [entry for entry in self._late if entry[2].out][-LATE_ROUNDS:]

    def site_of(self, reply: Message) -> Site:
        """Whose reply it is: the site's that was sent the order. Flower answers itself for a site that is gone."""
        return self._by_order[reply.metadata.reply_to_message_id]

    def read(self, round_: int, name: str, reply: Message, part: type[_Measured]) -> _Measured:
        """The answer of site `name`. Raises FederationError where it is none, or does not fit what was asked."""
        answer = messages.answer_of(reply, part)
        told = (answer.metrics.site, answer.metrics.round)
        if told != (name, round_):
            raise FederationError(f"it answered for {told}, ({name!r}, {round_}) was asked")
        numbers: RoundMetrics = answer.metrics
        call = self._ledger.calls[name]
        # Files may vanish while the run lasts; none may come.
        fewer = range(min(1, call.test_samples), call.test_samples + 1)
        if round_ and numbers.test_samples not in fewer:
            raise FederationError(
                f"it tested {numbers.test_samples} samples, at roll call it had {call.test_samples}"
            )
        tests = [numbers.tested, *filter(None, [numbers.tested_personal])]
        if not all(map(self.scoring.possible, tests)):
            raise FederationError("its test numbers contradict each other")
        classes = len(self._orders.spec.classes)
        if numbers.confusion is not None and not fits(numbers.confusion, numbers.tested, classes):
            raise FederationError("its confusion matrix contradicts its test numbers")
        return answer

    def _scalars(self, site: Site, reply: Message, samples: int) -> Scalars:
        """A site's scalars of a round, [steps, queries]. Raises UpdateError and FederationError where they are not that."""
        wanted = scalars_shape(self._config, samples)
        found = messages.from_arrays(reply.content, SCALARS, {SCALARS: wanted})
        if SCALARS not in found:
            raise UpdateError(
                f"update of site {site.name!r} refused: no scalars, {wanted[0]} steps are wanted"
            )
        return found[SCALARS]

    def update(self, round_: int, reply: Message, module: ModuleTensors) -> Update | None:
        """The reply's update when it passes its checks; a bad one is refused by name. `module`: what was sent."""
        site = self.site_of(reply)
        try:
            answer = self.read(round_, site.name, reply, Answer)
        except FedsplitError:
            return None  # Noted when it came in.
        received = self._orders.received(site, module)
        names = self._orders.plan(site, round_)
        try:
            if self._config.train.gradient == "zeroth-order":
                samples = min(answer.metrics.samples, site.call.samples)
                scalars = self._scalars(site, reply, samples)
                delta = replayed(
                    scalars,
                    self._config,
                    self._orders.backbone,
                    site=site.name,
                    round_=round_,
                    start={n: received[n] for n in names.trained},
                )
            else:
                wanted = {n: received[n].shape for n in names.sent}
                delta = messages.from_arrays(reply.content, DELTA, wanted)
            update = Update(site=site.name, samples=answer.metrics.samples, delta=delta)
            check_update(update, module=received, trained=names.sent, samples=site.call.samples)
            self._note_rank(site, answer.rank)
            if self._config.train.gradient == "zeroth-order":
                self._orders.log.add(round_, site.name, update.samples, scalars)
        except (UpdateError, FederationError) as err:
            self.left_out(round_, site.name, str(err))
            return None
        return update

    def _note_rank(self, site: Site, rank: int) -> None:
        """Raise UpdateError for a rank that the site cannot have pruned its own to; 0 is none."""
        if not rank:
            return
        now = self._orders.rank(site)
        wanted = kept_rank(self._config.module.rank_pruning, now)
        if rank != wanted or wanted == now:
            raise UpdateError(
                f"update of site {site.name!r} refused: it pruned its rank {now} to {rank}, rank-pruning="
                f"{self._config.module.rank_pruning:g} leaves {wanted}"
            )
        self.pruned[site.name] = rank

    def account(self, metrics: RoundMetrics) -> None:
        """Note a site's numbers."""
        self._ledger.metrics.append(metrics)
        self._run_dir.add_metrics(metrics)

    def left_out(self, round_: int, name: str, reason: str) -> None:
        """Note that a site is missing from a round."""
        self._ledger.absent(round_, name, reason)
        self._say(f"{round_name(round_)}: {name} left out: {reason}")

    def check_enough(self, round_: int, useful: int, *, done: int) -> None:
        """Raise FederationError below `min-sites` useful replies; `done` rounds are kept by then.

        RoundLostError where another try may help.
        """
        if useful >= self._config.server.min_sites:
            return
        lost = "; ".join(f"{s}: {why}" for r, s, why in self._ledger.absences if r == round_)
        kept = (
            f"the module after round {done} is kept in {self._run_dir.path}, "
            f"resume={self._run_dir.name} goes on from it"
            if done
            else f"no round was finished, resume={self._run_dir.name} starts it again"
        )
        text = (
            f"{round_name(round_)} got {useful} useful {'updates' if round_ else 'answers'}, "
            f"min-sites={self._config.server.min_sites} are wanted "
            f"({lost}); {kept}"
        )
        raise RoundLostError(text, why=lost) if self._may_pass else FederationError(text)

    def check_any(self, round_: int) -> None:
        """Raise RoundLostError where no site answered well and another try may help."""
        if not self._good and self._may_pass:
            lost = "; ".join(f"{s}: {why}" for r, s, why in self._ledger.absences if r == round_)
            raise RoundLostError(f"no site answered in round {round_}", why=lost)

    def _note(self, round_: int, name: str, reply: Message) -> None:
        """Account for one reply as it comes in."""
        try:
            answer = self.read(round_, name, reply, Answer)
        except FedsplitError as err:
            if not gone(reply):
                # What it holds is no longer certain: whole modules from now on.
                self._orders.log.failed(name)
            fault = messages.fault_of(reply)
            if fault is not None and fault.kind in _STUCK:
                self.stuck.add(name)
            self.left_out(round_, name, str(err))
            return
        self.account(answer.metrics)
        self._note_fewer(name, answer.metrics)

    def _note_fewer(self, name: str, metrics: RoundMetrics) -> None:
        """Say it where a site has fewer samples than at roll call."""
        call = self._ledger.calls[name]
        counts = [(metrics.test_samples, call.test_samples, "test")]
        if metrics.loss is not None:
            counts.append((metrics.samples, call.samples, "training"))
        for now, before, kind in counts:
            note = f"{name}: {now} of its {before} {kind} samples are left, the others are gone or changed since roll call"
            if now < before and note not in self._ledger.notes:
                self._ledger.note(note)
                self._say(note)

    def _status(self, phase: Phase, round_: int) -> None:
        self._run_dir.set_status(
            Status(
                phase=phase,
                round=round_,
                rounds=self._config.train.rounds,
                sites=tuple(sorted(s.name for s in self._orders.sites)),
                replied=tuple(self._replied),
            )
        )
