"""SplitStrategy: Flower's Message API with split rounds: mixed cuts, one message a site and round.

A round publishes the module version to the encoder, sends every site the tensors of its device, and averages
per tensor over the sites that trained it. Evaluation rides in the train message: a site tests the module it
receives before it trains it, so the curve costs no message of its own; one more message tests the last module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedsplit.core.aggregation import Update, aggregate, check_update
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FederationError, FedsplitError, UpdateError
from fedsplit.core.records import Phase, Status
from fedsplit.federation import messages
from fedsplit.federation.endpoint import Endpoint
from fedsplit.federation.exchange import exchange
from fedsplit.federation.ledger import Ledger
from fedsplit.federation.messages import Answer, LocalOnly
from fedsplit.federation.orders import Orders, Site
from fedsplit.federation.run_dir import Checkpoint, RunDir
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
        self._replied: list[str] = []
        self._orders = Orders(
            run=run_dir.name,
            config=config,
            backbone=backbone,
            spec=spec,
            sites=tuple(self.sites.values()),
            endpoint=endpoint,
        )

    # What Flower's Strategy asks for.

    def summary(self) -> None:
        """Log the set-up."""
        cuts = ", ".join(f"{s.name} at {s.cut}" for s in self.sites.values())
        self._say(f"{self.config.method} on {self.backbone.name}: {cuts}")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One train message a site, with the module tensors that its device holds."""
        del config, grid
        return self._orders.messages("train", server_round, _tensors(arrays))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the updates, average the good ones. Raises FederationError below `min-sites`."""
        updates = [u for u in (self._update(server_round, reply) for reply in replies) if u]
        if len(updates) < self.config.min_sites:
            raise FederationError(self._too_few(server_round, len(updates)))
        self.module = aggregate(self.module, updates)
        accuracy = self.ledger.accuracy_of_round(server_round)
        numbers = MetricRecord({"updates": len(updates), "accuracy-received": accuracy or 0.0})
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
        result, nothing = Result(), ConfigRecord()
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
            self.checkpoint()
        last = num_rounds + 1
        self._publish(last)
        orders = self.configure_evaluate(last, arrays, nothing, grid)
        replies = self._exchange(grid, last, orders, "evaluating")
        if (tested := self.aggregate_evaluate(last, replies)) is not None:
            result.evaluate_metrics_clientapp[num_rounds] = tested
        return result

    def compare_local_only(self, grid: Grid, arrays: ArrayRecord) -> None:
        """Let every site train alone, for as many epochs as the run has, and note what it reaches."""
        self.module = _tensors(arrays)
        self._publish(0)
        orders = self._orders.messages("local-only", 0, self.module)
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

    def checkpoint(self) -> None:
        """Save the module as it is after the last round."""
        ledger = self.ledger
        state = {
            "absences": [list(a) for a in ledger.absences],
            "local_only": {n: o.model_dump() for n, o in ledger.local_only.items()},
            "wall_s": ledger.wall_s(),
        }
        self.run_dir.save_checkpoint(Checkpoint(self.rounds_done, self.module, state))

    # The steps.

    def _publish(self, round_: int) -> None:
        if all(site.cut.local(self.backbone.blocks) for site in self.sites.values()):
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
    ) -> list[Message]:
        """Send, and note who answers and who does not."""
        wait_s = deadline_s or self.config.deadline_s
        by_name = {self.sites[m.metadata.dst_node_id].name: m for m in orders}
        self._replied = []
        self._status(phase, round_)
        replies = []
        for name, reply in exchange(grid, by_name, deadline_s=wait_s):
            replies.append(reply)
            if round_ > 0:
                self._note(round_, name, reply)
            self._replied.append(name)
            self._status(phase, round_)
        for name in sorted(by_name.keys() - set(self._replied)):
            self.ledger.absent(round_, name, f"no answer within {wait_s:g} s")
            self._say(f"round {round_}: no answer from {name} within {wait_s:g} s")
        return replies

    def _note(self, round_: int, name: str, reply: Message) -> None:
        """Account for one reply as it comes in."""
        try:
            answer = self._read(round_, name, reply)
        except FedsplitError as err:
            self.ledger.absent(round_, name, str(err))
            self._say(f"round {round_}: {name} left out: {err}")
            return
        self.ledger.metrics.append(answer.metrics)
        self.run_dir.add_metrics(answer.metrics)

    def _read(self, round_: int, name: str, reply: Message) -> Answer:
        _raise_fault(reply)
        answer = messages.read(reply.content, messages.ANSWER, Answer)
        told = (answer.metrics.site, answer.metrics.round)
        if told != (name, round_):
            raise FederationError(f"it answered for {told}, ({name!r}, {round_}) was asked")
        numbers = answer.metrics
        call = self.ledger.calls[name]
        if numbers.test_samples != call.test_samples:
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
        try:
            delta = messages.from_arrays(reply.content, messages.DELTA)
            update = Update(site=site.name, samples=answer.metrics.samples, delta=delta)
            check_update(
                update,
                module=self.module,
                trained=module.trained_names(
                    self.backbone,
                    self.spec,
                    site.cut,
                    head=self.config.trains_head(site.cut),
                ),
                samples=site.call.samples,
            )
        except (UpdateError, FederationError) as err:
            self.ledger.absent(round_, site.name, str(err))
            self._say(f"round {round_}: {err}")
            return None
        return update

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
