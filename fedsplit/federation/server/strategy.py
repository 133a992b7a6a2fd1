"""SplitStrategy: Flower's Message API with split rounds: mixed cuts, one message a site and round.

A round publishes the module version to the encoder, sends every site the tensors of its device, and averages
per tensor over the sites that trained it. Evaluation rides in the train message: a site tests the module it
receives before it trains it, so the curve costs no message of its own; one more message tests the last module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.lora_rules import rule_of
from fedsplit.core.orders import LocalOnly, OrderKind
from fedsplit.federation import messages
from fedsplit.federation.server import before_rounds
from fedsplit.federation.server.attendance import Attendance
from fedsplit.federation.server.books.ledger import Ledger
from fedsplit.federation.server.books.replay_log import ReplayLog, replayable
from fedsplit.federation.server.books.run_dir import Checkpoint, RunDir
from fedsplit.federation.server.combine.best import Best
from fedsplit.federation.server.combine.combiner import Combiner
from fedsplit.federation.server.combine.guard import Guard, Version
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.exchange import WINDOW, WINDOW_SIMULATED
from fedsplit.federation.server.orders import Orders, Site, round_name
from fedsplit.federation.server.replies import Replies
from fedsplit.federation.server.twice import Twice
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
        attendance: Attendance,
        endpoint: Endpoint,
        run_dir: RunDir,
        ledger: Ledger,
        simulated: bool = False,
        on_update: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.spec = spec
        self.sites = attendance.sites
        """The same list: a newcomer is in it from its first round on."""
        self.endpoint = endpoint
        self.run_dir = run_dir
        self.ledger = ledger
        self.module: ModuleTensors = {}
        self.rounds_done = 0
        self._say = on_update
        self._attendance = attendance
        self._best = Best(ledger.scoring, patience=config.server.early_stop_rounds)
        rule = rule_of(
            config.module.lora_aggregation,
            scale=config.module.lora_alpha / config.module.lora_rank,
            seed=config.run.seed,
        )
        self._orders = Orders(
            log=ReplayLog(
                replayable(
                    config,
                    [s.cut for s in self.sites],
                    [s.rank for s in self.sites],
                )
            ),
            run=run_dir.label,
            run_key=run_dir.key,
            config=config,
            backbone=backbone,
            spec=spec,
            rule=rule,
            sites=self.sites,
            endpoint=endpoint,
            simulated=simulated,
            state_dir=str(run_dir.path / "sites") if simulated else "",
        )
        self._replies = Replies(
            self._orders,
            attendance=attendance,
            ledger=ledger,
            run_dir=run_dir,
            window=WINDOW_SIMULATED if simulated else WINDOW,
            on_update=on_update,
        )
        self._combiner = Combiner(config, rule, self._orders, on_update=on_update)
        self._combiner.check()
        self._twice = Twice(
            self._orders,
            attendance=attendance,
            ledger=ledger,
            run_dir=run_dir,
            on_update=on_update,
        )
        self._guard = Guard(config, backbone.family.classifier, ledger.scoring)

    # What Flower's Strategy asks for.

    def summary(self) -> None:
        """Log the set-up."""
        cuts = ", ".join(f"{s.name} at {s.cut}" for s in self.sites)
        self._say(f"{self.config.run.method} on {self.backbone.name}: {cuts}")

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
        updates = (self._replies.update(server_round, reply, self.module) for reply in replies)
        good = [update for update in updates if update]
        if (undone := self._undo(server_round)) is not None:
            return undone
        good = self._guard.within(server_round, good, self._replies.left_out)
        self._orders.log.settle(server_round, {u.site: u.samples for u in good})
        self._replies.check_enough(server_round, len(good), done=self.rounds_done)
        combined = self._combiner.combine(server_round, self.module, good)
        if self._best.improved(self.ledger.scores_of_round(server_round)):
            self._best.keep(self.module)
        self.module = combined
        # Only now: what came was of the ranks that were sent.
        self._orders.ranks.update(self._replies.pruned)
        return messages.to_arrays(self.module), self._numbers(server_round, updates=len(good))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One evaluate message a site; only the last module is tested by a message of its own."""
        del config, grid
        return self._orders.messages("evaluate", server_round, _tensors(arrays))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Note the sites' numbers; the scores over all test samples."""
        for _ in replies:
            pass  # Each is noted as it comes in.
        if self._undo(server_round) is not None:
            self.checkpoint()
        scores = self.ledger.scores_of_round(server_round)
        return None if scores is None else MetricRecord({**scores})

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
        result = into or Result()
        self.module = _tensors(initial_arrays)
        self.rounds_done = first_round - 1
        self.summary()
        arrays = initial_arrays
        for round_ in range(first_round, num_rounds + 1):
            train = partial(self._train, grid, round_, arrays)
            new_arrays, numbers = self._twice.do(round_, train)
            assert new_arrays is not None
            assert numbers is not None
            arrays = result.arrays = new_arrays
            result.train_metrics_clientapp[round_] = numbers
            self.rounds_done = round_
            if self._best.over:
                self._say(
                    f"round {round_}: no better {self.ledger.scoring.main} in {self.config.server.early_stop_rounds} rounds; the best "
                    f"module is kept"
                )
                self.module = self._best.module
                arrays = messages.to_arrays(self.module)
                self.checkpoint()
                break
            self.checkpoint()
            yield
        last = self.rounds_done + 1
        test = partial(self._test, grid, last, arrays)
        if (tested := self._twice.do(last, test)) is not None:
            result.evaluate_metrics_clientapp[self.rounds_done] = tested

    def compare_local_only(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Let every site train alone, for as many epochs as the run has, and note what it reaches."""
        self.module = _tensors(arrays)

        def alone() -> dict[str, LocalOnly]:
            self._publish(0)
            found = before_rounds.local_only(grid, self._orders, self._replies, self.module)
            reached = dict(found)
            if self.config.run.method == "local-only":
                # There it is all the training of the run.
                self._replies.check_enough(0, len(reached), done=0)
            return reached

        self.ledger.local_only.update(self._twice.do(0, alone))

    def closed_form_start(self, grid: Grid, arrays: ArrayRecord) -> ArrayRecord:
        """The module with its classifier solved from the sites' summed statistics, calibrated if wanted."""
        self.module = _tensors(arrays)

        def solved() -> ModuleTensors:
            self._publish(0)
            return before_rounds.closed_form(grid, self._orders, self._replies, self.module)

        self.module = self._twice.do(0, solved)
        return messages.to_arrays(self.module)

    def checkpoint(self) -> None:
        """Save the module as it is after the last round."""
        ledger = self.ledger
        state = {
            "absences": [list(a) for a in ledger.absences],
            "local_only": {n: o.model_dump() for n, o in ledger.local_only.items()},
            "wall_s": ledger.wall_s(),
            "notes": list(ledger.notes),
            "best": self._best.state(),
            "ranks": dict(self._orders.ranks),
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
        self._orders.ranks.update(saved.state.get("ranks", {}))
        best = {n.removeprefix("best/"): t for n, t in saved.extra.items() if n.startswith("best/")}
        self._best.restore(saved.state.get("best", {}), best)

    # The steps.

    def _train(
        self, grid: Grid, round_: int, arrays: ArrayRecord
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._attendance.begin_round()
        self._publish(round_)
        orders = self.configure_train(round_, arrays, ConfigRecord(), grid)
        again = self._once_more("train", round_)
        replies = self._replies.awaited(grid, round_, orders, "training", again=again)
        return self.aggregate_train(round_, replies)

    def _test(self, grid: Grid, round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        self._publish(round_)
        orders = self.configure_evaluate(round_, arrays, ConfigRecord(), grid)
        again = self._once_more("evaluate", round_)
        replies = self._replies.awaited(grid, round_, orders, "evaluating", again=again)
        tested = self.aggregate_evaluate(round_, replies)
        if tested is None and round_ not in self._orders.repeated:
            self._replies.check_any(round_)
        return tested

    def _undo(self, round_: int) -> tuple[ArrayRecord, MetricRecord] | None:
        """Go back to the last good module where the one that this round sent out does harm, and say so."""
        tested = Version(self.module, optimizer=self._combiner.rule.state(), round=round_ - 1)
        rows = [m for m in self.ledger.metrics if m.round == round_]
        back = self._guard.undo(tested, rows, self._replies.stuck, self._replies.asked)
        if back is None:
            return None
        good, why = back
        self.module = good.module
        self._combiner.rule.restore(good.optimizer)
        self._orders.log.clear()
        self.ledger.note(f"round {round_ - 1} was undone: {why}")
        self._say(f"round {round_}: {why}")
        return messages.to_arrays(self.module), self._numbers(round_, updates=0)

    def _numbers(self, round_: int, *, updates: int) -> MetricRecord:
        """What Flower's result keeps of a round: the updates that counted, and the scores of the module that was sent."""
        scores = self.ledger.scores_of_round(round_) or {}
        received = {f"{name}-received": value for name, value in scores.items()}
        return MetricRecord({"updates": updates, **received})

    def _publish(self, round_: int) -> None:
        if self._orders.all_local:
            return
        names = module.server_names(self.backbone, self.spec)
        packed = module.pack(self.spec, {n: self.module[n] for n in names})
        self.endpoint.deliver(
            self._orders.version(round_),
            packed,
            wait_s=self.config.server.deadline_s,
            on_update=lambda text: self._say(f"{round_name(round_)}: {text}"),
        )

    def _once_more(self, kind: OrderKind, round_: int) -> Callable[[Site], Iterator[Message]]:
        """Makes the order of a round again for a site that is back."""
        selected = self._selected(round_) if kind == "train" else None
        tensors = self.module
        return lambda site: self._orders.messages(kind, round_, tensors, selected, only=site)

    def _selected(self, round_: int) -> list[Site]:
        """The sites that train in a round: all, or a draw by seed and round."""
        sites = self.sites
        count = self.config.server.selected(len(sites))
        if count < 1:
            raise ConfigError(
                f"participation={self.config.server.participation:g} of {len(sites)} sites selects nobody; raise it"
            )
        draw = np.random.default_rng([self.config.run.seed, round_]).choice(
            len(sites), size=count, replace=False
        )
        return [sites[i] for i in sorted(draw)]


def _tensors(arrays: ArrayRecord) -> ModuleTensors:
    return {name: array.numpy() for name, array in arrays.items()}
