"""One way through all tasks: a real run for each, in this process, and a test of every task so far after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.forgetting.table import Row
from experiments.forgetting.tasks import Plan, Task
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FederationError
from fedsplit.core.records import Summary
from fedsplit.experiment.bench import Bench
from fedsplit.experiment.cells import Cell
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import whole_model
from fedsplit.report.read import read_summary
from fedsplit.training import data
from fedsplit.training.round import evaluate
from fedsplit.training.site_data import SiteSources
from fedsplit.training.site_settings import SiteSettings

_BATCH = 64


@dataclass(frozen=True)
class Trained:
    """A task after its own training."""

    task: Task
    config: RunConfig
    spec: ModuleSpec
    tensors: ModuleTensors


def chain(
    bench: Bench, plan: Plan, tasks: Sequence[Task], *, way: str, seed: int, runs: Path
) -> Iterator[list[Row]]:
    """The rows of each stage as it is done. Raises FederationError when a run is not complete."""
    backbone = Backbone.find(plan.backbone)
    done: list[Trained] = []
    sources = SiteSources()
    before: Path | None = None
    for task in tasks:
        config = _config(plan, task, way=way, seed=seed, runs=runs, start=before)
        summary = _run(bench, config)
        folder = runs / config.run.run_name / summary.module
        done.append(Trained(task, config, *module.load_exported(folder, backbone)))
        if way == "full":
            before = folder
        yield [
            Row(
                way=way,
                seed=seed,
                trained=task.name,
                task=earlier.task.name,
                accuracy=accuracy(
                    sources, backbone, earlier, _now(backbone, earlier, done[-1], way)
                ),
                bytes_round=summary.bytes_module // summary.rounds_done,
                bytes_round_full_model=summary.bytes_full_model // summary.rounds_done,
            )
            for earlier in done
        ]


def _config(
    plan: Plan, task: Task, *, way: str, seed: int, runs: Path, start: Path | None
) -> RunConfig:
    own = {
        "runs-dir": str(runs),
        "run-name": f"{way}-{seed}-{task.name}",
        "start-module": str(start or ""),
    }
    return RunConfig.from_flat(plan.settings(way, task, seed) | own)


def _run(bench: Bench, config: RunConfig) -> Summary:
    cell = Cell(
        method=config.run.method,
        problem=config.task.name,
        axes=(),
        seed=config.run.seed,
        config=config,
    )
    row = bench.run(cell)
    if row.outcome != "complete":
        raise FederationError(f"run {config.run.run_name} is {row.outcome}: {row.reason}")
    return read_summary(Path(config.run.runs_dir) / config.run.run_name)


def _now(backbone: Backbone, earlier: Trained, last: Trained, way: str) -> ModuleTensors:
    """What answers for an earlier task now: its module, or its classifier on the last weights of the backbone."""
    if way == "fedyolo":
        return earlier.tensors
    classifier = backbone.family.classifier
    return {
        name: (earlier if name.split(".", 1)[0] in classifier else last).tensors[name]
        for name in earlier.tensors
    }


def accuracy(
    sources: SiteSources, backbone: Backbone, of: Trained, tensors: ModuleTensors
) -> float:
    """Share of the test samples of all the task's sites that come out right."""
    site = SiteSettings.from_node(
        {"partition-id": 0, "num-partitions": of.config.server.sites}, node_id=1
    )
    own = sources.open(of.config, site, backbone, of.spec.classes)
    batches = data.batches(own.examples, own.test_everywhere, own.transform, batch_size=_BATCH)
    found = evaluate(whole_model(backbone, of.spec, tensors), batches)
    return found.sums["correct"] / found.samples
