"""Several tasks in one run: a Run for each, which take turns round by round over one grid and one encoder.

Each task has its own module, sites, checkpoints and summary, in a folder of its own inside the run's, and one that
fails leaves the others be. Since one task works at a time, the encoder needs room for the version of one only, and
each module is what a run of its task alone would have made (FedYolo, arXiv 2307.04905: a task is a module).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flwr.common.logger import LOGGER_NAME
from flwr.serverapp import Grid

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FederationError, FedsplitError
from fedsplit.core.records import TASKS_MARK, Status, Summary, TasksSummary
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.model.backbone import Backbone

TASKS_FILE = "tasks.json"
_log = logging.getLogger(LOGGER_NAME)


@dataclass
class _TaskRun:
    """One task and how far it is."""

    name: str
    run: Run | None
    """None where it had ended already when the run was resumed."""
    turns: Iterator[None]
    summary: Summary | None = None


class TaskRuns:
    """A run of several tasks from the first roll call to the last summary."""

    def __init__(
        self, grid: Grid, config: RunConfig, endpoint: Endpoint, *, simulated: bool
    ) -> None:
        """Raises FedsplitError for what would fail every task: the backbone, the run's folder."""
        self.config = config
        backbone = Backbone.find(config.placement.backbone)
        # Before the folder is made: then the run's name is not taken by what could never begin.
        config.fitted(backbone.blocks).check_blocks(backbone.blocks)
        runs = Path(config.run.runs_dir)
        if config.run.resume:
            self.dir = RunDir.reopen(runs, config.run.resume)
            self.dir.forget(TASKS_FILE)
        else:
            self.dir = RunDir.create(runs, config.run.run_name, task="tasks")
            self.dir.write_json("config.json", {"config": config.flat()})
        self._tasks = [self._task(name, grid, endpoint, simulated) for name in config.task.sources]

    def go(self) -> TasksSummary:
        """Train all tasks. Raises FederationError at the end, with everything kept, when one of them failed."""
        waiting = [task for task in self._tasks if task.run is not None]
        while waiting:
            waiting = [task for task in waiting if self._turn(task)]
        summary = self._finish()
        if summary.outcome == "failed":
            failed = [t for t in summary.tasks if t.outcome == "failed"]
            raise FederationError(
                f"{len(failed)} of {len(summary.tasks)} tasks failed: {_reasons(failed)}; "
                f"resume={self.dir.name} goes on with those alone"
            )
        return summary

    @property
    def finished(self) -> list[Path]:
        """Folders of the tasks that ended well."""
        return [path for task in self._tasks if task.run for path in task.run.finished]

    def _task(self, name: str, grid: Grid, endpoint: Endpoint, simulated: bool) -> _TaskRun:
        config, folder = self.config.of_task(name), self.dir.of_task(name)
        if config.run.resume:
            summary = folder.read_summary()
            if summary is not None and summary.outcome != "failed":
                return _TaskRun(name, None, iter(()), summary)
            if not folder.begun:
                config = config.changed(resume="")
        folder.on_status = lambda status: self._show(status, name)
        run = Run(grid, config, endpoint, simulated=simulated, run_dir=folder)
        return _TaskRun(name, run, run.turns())

    def _turn(self, task: _TaskRun) -> bool:
        """Let a task work until it stops; True when it wants another turn."""
        try:
            next(task.turns)
        except StopIteration:
            return False
        except Exception as err:  # noqa: BLE001 - the outermost handler of a task's run
            known = isinstance(err, FedsplitError)
            _log.error("task %s failed, the others go on: %s", task.name, err, exc_info=not known)
            return False
        return True

    def _show(self, status: Status, task: str) -> None:
        """Tell in the run's own status whose turn it is; that a task has ended is not the run's end."""
        if status.phase not in ("done", "failed"):
            self.dir.set_status(status.model_copy(update={"task": task}))

    def _finish(self) -> TasksSummary:
        ended = [task.run.summary if task.run else task.summary for task in self._tasks]
        summary = TasksSummary(run=self.dir.name, tasks=tuple(s for s in ended if s is not None))
        self.dir.write_json(TASKS_FILE, summary)
        self.dir.set_status(
            Status(
                phase="failed" if summary.outcome == "failed" else "done",
                round=max((task.rounds_done for task in summary.tasks), default=0),
                rounds=self.config.train.rounds,
                sites=tuple(sorted({site.name for task in summary.tasks for site in task.sites})),
                replied=(),
                message=summary.reason,
            )
        )
        text = json.dumps(json.loads(summary.model_dump_json()), separators=(",", ":"))
        _log.info("%s %s", TASKS_MARK, text)
        return summary


def _reasons(failed: list[Summary]) -> str:
    return "; ".join(f"{task.task}: {task.reason}" for task in failed)
