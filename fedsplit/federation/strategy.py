"""SplitStrategy: Flower's Message API with split rounds: mixed cuts, one message a site and round.

A round publishes the module version to the encoder, sends every site the tensors of its device, and averages
per tensor over the sites that trained it. Evaluation rides in the train message: a site tests the module it
receives before it trains it, so the curve costs no message of its own; one more message tests the last module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsplit.core.aggregation import Update, check_update
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import (
    ConfigError,
    FederationError,
    FedsplitError,
    UpdateError,
)
from fedsplit.core.lora_rules import rule_of
from fedsplit.core.records import Phase, RoundMetrics, Status
from fedsplit.federation import messages
from fedsplit.federation.best import Best
from fedsplit.federation.closed_form_start import ClosedFormStart
from fedsplit.federation.combiner import Combiner
from fedsplit.federation.endpoint import Endpoint
from fedsplit.federation.exchange import WINDOW, WINDOW_SIMULATED, exchange
from fedsplit.federation.ledger import Ledger
from fedsplit.federation.messages import Answer, Calibration, Kind, LocalOnly
from fedsplit.federation.orders import Orders, Site
from fedsplit.federation.replay_log import ReplayLog, replayable
from fedsplit.federation.run_dir import Checkpoint, RunDir
from fedsplit.federation.zeroth_order import replayed
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors


class SplitStrategy(Strategy):
    """Split federated training of one module over sites with any cuts."""

    def __init__(
        self,
        *,
        config: RunConfig,
        backbone: Backbone,
        spec: ModuleSpec,
        sites: Iterable[Site],
        endpoint: Endpoint,
        run_dir: RunDir,
        ledger: Ledger,
        simulated: bool = False,
        on_update: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.spec = spec
        self.sites = {site.node_id: site for site in sites}
        self.endpoint = endpoint
        self.run_dir = run_dir
        self.ledger = ledger
        self.module: ModuleTensors = {}
        self.rounds_done = 0
        self._say = on_update
        self._window = WINDOW_SIMULATED if simulated else WINDOW
        self._replied: list[str] = []
        self._best = Best(patience=config.early_stop_rounds)
        rule = rule_of(
            config.lora_aggregation, scale=config.lora_alpha / config.lora_rank, seed=config.seed
        )
        self._log = ReplayLog(
            replayable(
                config,
                [s.cut for s in self.sites.values()],
                [s.rank for s in self.sites.values()],
            )
        )
        self._orders = Orders(
            log=self._log,
            run=run_dir.label,
            config=config,
            backbone=backbone,
            spec=spec,
            rule=rule,
            sites=tuple(self.sites.values()),
            endpoint=endpoint,
            state_dir=str(run_dir.path / "sites") if simulated else "",
        )
        self._combiner = Combiner(config, rule, self._orders, on_update=on_update)
        self._combiner.check()

    # What Flower's Strategy asks for.

    def summary(self) -> None:
        """Log the set-up."""
        cuts = ", ".join(f"{s.name} at {s.cut}" for s in self.sites.values())
        self._say(f"{self.config.method} on {self.backbone.name}: {cuts}")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message a selected site, with the module tensors that its device holds."""
        del config, grid
        return self._orders.messages(
            "train", server_round, _tensors(arrays), self._selected(server_round)
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the updates, combine the good ones. Raises FederationError below `min-sites`."""
        good = [u for u in (self._update(server_round, reply) for reply in replies) if u]
        if len(good) < self.config.min_sites:
            raise FederationError(self._too_few(server_round, len(good)))
        if self._best.improved(self.ledger.accuracy_of_round(server_round)):
            self._best.keep(self.module)
        self.module = self._combiner.combine(server_round, self.module, good)
        accuracy = self.ledger.accuracy_of_round(server_round)
        numbers = MetricRecord({"updates": len(good), "accuracy-received": accuracy or 0.0})
        return messages.to_arrays(self.module), numbers

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One evaluate message a site; only the last module is tested by a message of its own."""
        del config, grid
        return self._orders.messages("evaluate", server_round, _tensors(arrays))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Note the sites' numbers; the accuracy over all test samples."""
        for reply in replies:
            self._answer(server_round, reply)
        accuracy = self.ledger.accuracy_of_round(server_round)
        return None if accuracy is None else MetricRecord({"accuracy": accuracy})

    # The run.

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *, first_round: int = 1
    ) -> Result:
        """Train for rounds `first_round`..`num_rounds`, then test the last module. Checkpoints each round."""
        result = Result()
        for _ in self.turns(grid, initial_arrays, num_rounds, first_round=first_round, into=result):
            pass
        return result

    def turns(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        *,
        first_round: int = 1,
        into: Result | None = None,
    ) -> Iterator[None]:
        """What `start` does, with a stop after each round's checkpoint: the results go `into` one of Flower's."""
        result, nothing = into or Result(), ConfigRecord()
        self.module = _tensors(initial_arrays)
        self.rounds_done = first_round - 1
        self.summary()
        arrays = initial_arrays
        for round_ in range(first_round, num_rounds + 1):
            self._publish(round_)
            orders = self.configure_train(round_, arrays, nothing, grid)
            replies = self._exchange(grid, round_, orders, "training")
            new_arrays, numbers = self.aggregate_train(round_, replies)
            assert new_arrays is not None
            assert numbers is not None
            arrays = result.arrays = new_arrays
            result.train_metrics_clientapp[round_] = numbers
            self.rounds_done = round_
            if self._best.over:
                self._say(
                    f"round {round_}: no better accuracy in {self.config.early_stop_rounds} rounds; the best "
                    f"module is kept"
                )
                self.module = self._best.module
                arrays = messages.to_arrays(self.module)
                self.checkpoint()
                break
            self.checkpoint()
            yield
        last = self.rounds_done + 1
        self._publish(last)
        orders = self.configure_evaluate(last, arrays, nothing, grid)
        replies = self._exchange(grid, last, orders, "evaluating")
        if (tested := self.aggregate_evaluate(last, replies)) is not None:
            result.evaluate_metrics_clientapp[self.rounds_done] = tested

    def compare_local_only(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Let every site train alone, for as many epochs as the run has, and note what it reaches."""
        self.module = _tensors(arrays)
        orders = self._orders.messages("local-only", 0, self.module)
        self._publish(0)
        deadline_s = self._orders.deadline_s("local-only")
        for reply in self._exchange(grid, 0, orders, "training", deadline_s=deadline_s):
            site = self.sites[reply.metadata.src_node_id]
            try:
                _raise_fault(reply)
                alone = messages.read(reply.content, messages.ANSWER, LocalOnly)
            except FederationError as err:
                self._say(f"{site.name} could not train alone: {err}")
                continue
            self.ledger.local_only[site.name] = alone

    def closed_form_start(self, grid: Grid, arrays: ArrayRecord) -> ArrayRecord:
        """The module with its classifier solved from the sites' summed statistics, calibrated if wanted."""
        self.module = _tensors(arrays)
        start = ClosedFormStart(self.config, self.backbone, self.spec, self.module)
        self._publish(0)
        for site, reply in self._asked(grid, "statistics"):
            try:
                answer = self._read(0, site.name, reply)
                start.add(site.name, messages.from_arrays(reply.content, messages.STATISTICS))
            except FedsplitError as err:
                self._left_out(0, site.name, str(err))
                continue
            self._account(answer.metrics)
        if start.sites < self.config.min_sites:
            raise FederationError(self._too_few(0, start.sites))
        if self.config.calibrate:
            self.module = self.module | start.provisional()
            for site, reply in self._asked(grid, "calibrate"):
                try:
                    _raise_fault(reply)
                    told = messages.read(reply.content, messages.ANSWER, Calibration)
                    start.add_nll(told.nll)
                except FedsplitError as err:
                    self._left_out(0, site.name, str(err))
                    continue
                self._account(told.metrics)
        self.module = self.module | start.final()
        return messages.to_arrays(self.module)

    def _asked(self, grid: Grid, kind: Kind) -> Iterator[tuple[Site, Message]]:
        """The replies to an order before the first round."""
        orders = self._orders.messages(kind, 0, self.module)
        for reply in self._exchange(grid, 0, orders, "starting"):
            yield self.sites[reply.metadata.src_node_id], reply

    def checkpoint(self) -> None:
        """Save the module as it is after the last round."""
        ledger = self.ledger
        state = {
            "absences": [list(a) for a in ledger.absences],
            "local_only": {n: o.model_dump() for n, o in ledger.local_only.items()},
            "wall_s": ledger.wall_s(),
            "best": self._best.state(),
        }
        extra = {f"server/{n}": t for n, t in self._combiner.rule.state().items()}
        extra |= {f"best/{n}": t for n, t in self._best.module.items()}
        self.run_dir.save_checkpoint(Checkpoint(self.rounds_done, self.module, state, extra))

    def restore(self, saved: Checkpoint) -> None:
        """Go on from what `checkpoint` saved, but for the module itself, which `start` is given."""
        server = "server/"
        self._combiner.rule.restore(
            {n.removeprefix(server): t for n, t in saved.extra.items() if n.startswith(server)}
        )
        best = {n.removeprefix("best/"): t for n, t in saved.extra.items() if n.startswith("best/")}
        self._best.restore(saved.state.get("best", {}), best)

    # The steps.

    def _publish(self, round_: int) -> None:
        if self._orders.all_local:
            return
        names = module.server_names(self.backbone, self.spec)
        packed = module.pack(self.spec, {n: self.module[n] for n in names})
        self.endpoint.publish(self._orders.version(round_), packed)

    def _exchange(
        self,
        grid: Grid,
        round_: int,
        orders: Iterable[Message],
        phase: Phase,
        *,
        deadline_s: float | None = None,
    ) -> Iterator[Message]:
        """Send; note who answers and who does not, as it happens."""
        wait_s = deadline_s or self.config.deadline_s
        asked: list[str] = []

        def named() -> Iterator[tuple[str, Message]]:
            for order in orders:
                asked.append(self.sites[order.metadata.dst_node_id].name)
                yield asked[-1], order

        self._replied = []
        self._status(phase, round_)
        for name, reply in exchange(grid, named(), deadline_s=wait_s, window=self._window):
            if round_ > 0:
                self._note(round_, name, reply)
            self._replied.append(name)
            self._status(phase, round_)
            yield reply
        for name in sorted(set(asked) - set(self._replied)):
            self._left_out(round_, name, f"no answer within {wait_s:g} s")

    def _note(self, round_: int, name: str, reply: Message) -> None:
        """Account for one reply as it comes in."""
        try:
            answer = self._read(round_, name, reply)
        except FedsplitError as err:
            # What it holds is no longer certain: whole modules from now on.
            self._log.failed(name)
            self._left_out(round_, name, str(err))
            return
        self._account(answer.metrics)

    def _account(self, metrics: RoundMetrics) -> None:
        self.ledger.metrics.append(metrics)
        self.run_dir.add_metrics(metrics)

    def _left_out(self, round_: int, name: str, reason: str) -> None:
        self.ledger.absent(round_, name, reason)
        self._say(f"round {round_}: {name} left out: {reason}")

    def _read(self, round_: int, name: str, reply: Message) -> Answer:
        _raise_fault(reply)
        answer = messages.read(reply.content, messages.ANSWER, Answer)
        told = (answer.metrics.site, answer.metrics.round)
        if told != (name, round_):
            raise FederationError(f"it answered for {told}, ({name!r}, {round_}) was asked")
        numbers = answer.metrics
        call = self.ledger.calls[name]
        if round_ and numbers.test_samples != call.test_samples:
            raise FederationError(
                f"it tested {numbers.test_samples} samples, at roll call it had {call.test_samples}"
            )
        if max(numbers.correct_global, numbers.correct_personal or 0) > numbers.test_samples:
            raise FederationError("its test numbers contradict each other")
        return answer

    def _answer(self, round_: int, reply: Message) -> tuple[Site, Answer] | None:
        site = self.sites[reply.metadata.src_node_id]
        try:
            return site, self._read(round_, site.name, reply)
        except FedsplitError:
            return None  # Noted when it came in.

    def _update(self, round_: int, reply: Message) -> Update | None:
        """The reply's update when it passes its checks; a bad one is refused by name."""
        found = self._answer(round_, reply)
        if found is None:
            return None
        site, answer = found
        received = self._orders.received(site, self.module)
        names = self._orders.plan(site, round_)
        try:
            if self.config.gradient == "zeroth-order":
                delta = self._replayed(round_, site, reply, {n: received[n] for n in names.trained})
            else:
                delta = messages.from_arrays(reply.content, messages.DELTA)
            update = Update(site=site.name, samples=answer.metrics.samples, delta=delta)
            check_update(update, module=received, trained=names.sent, samples=site.call.samples)
            if self.config.gradient == "zeroth-order":
                scalars = messages.from_arrays(reply.content, messages.SCALARS)[messages.SCALARS]
                self._log.add(round_, site.name, update.samples, scalars)
        except (UpdateError, FederationError) as err:
            self._left_out(round_, site.name, str(err))
            return None
        return update

    def _replayed(
        self, round_: int, site: Site, reply: Message, start: ModuleTensors
    ) -> ModuleTensors:
        return replayed(
            reply.content,
            self.config,
            self.backbone,
            site=site.name,
            samples=site.call.samples,
            round_=round_,
            start=start,
        )

    def _selected(self, round_: int) -> list[Site]:
        """The sites that train in a round: all, or a draw by seed and round."""
        sites = list(self.sites.values())
        count = self.config.selected(len(sites))
        if count < 1:
            raise ConfigError(
                f"participation={self.config.participation:g} of {len(sites)} sites selects nobody; raise it"
            )
        draw = np.random.default_rng([self.config.seed, round_]).choice(
            len(sites), size=count, replace=False
        )
        return [sites[i] for i in sorted(draw)]

    def _too_few(self, round_: int, useful: int) -> str:
        lost = "; ".join(f"{s}: {why}" for r, s, why in self.ledger.absences if r == round_)
        kept = (
            f"the module after round {self.rounds_done} is kept in {self.run_dir.path}, "
            f"resume={self.run_dir.name} goes on from it"
            if self.rounds_done
            else f"no round was finished, resume={self.run_dir.name} starts it again"
        )
        return (
            f"round {round_} got {useful} useful updates, min-sites={self.config.min_sites} are wanted "
            f"({lost}); {kept}"
        )

    def _status(self, phase: Phase, round_: int) -> None:
        self.run_dir.set_status(
            Status(
                phase=phase,
                round=round_,
                rounds=self.config.rounds,
                sites=tuple(sorted(s.name for s in self.sites.values())),
                replied=tuple(self._replied),
            )
        )


def _tensors(arrays: ArrayRecord) -> ModuleTensors:
    return {name: array.numpy() for name, array in arrays.items()}


def _raise_fault(reply: Message) -> None:
    if (fault := messages.fault_of(reply)) is not None:
        raise FederationError(fault.message)
