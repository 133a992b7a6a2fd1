"""`fedsplit experiment`: a grid of runs with progress, a table and figures. The work is `fedsplit.experiment`'s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fedsplit.cli.console import Output
from fedsplit.cli.endings import Interrupted, Terminated
from fedsplit.cli.experiment_files import Book
from fedsplit.cli.run import JsonFlag

if TYPE_CHECKING:
    from fedsplit.experiment.cells import Cell
    from fedsplit.experiment.plan import GridPlan
    from fedsplit.experiment.results import Row


def experiment(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="What to run.")],
    jobs: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Runs at once, a process each.")
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Run only this method of the grid; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results; else the grid's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list the runs, start none.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods on a grid: CSV, table and figures; goes on where it stopped.

    Exit codes: 0 all complete, 3 some runs failed or are partial, 1 all failed, 2 wrong grid, 130 interrupted.
    """
    from fedsplit.experiment.plan import make_plan

    output = Output(as_json=as_json)
    output.note("checking the grid ...")
    plan = make_plan(grid, out=out, only=tuple(only or ()))
    if dry_run:
        _show_plan(plan, output)
        return
    code = run_plan(plan, output, jobs=jobs)
    raise typer.Exit(code)


def run_plan(plan: GridPlan, output: Output, *, jobs: int) -> int:
    """Tune, run, write everything, tell how it ended; the exit code."""
    from fedsplit.experiment.schedule import Schedule

    book = Book(plan.grid, plan.out, runs=len(plan.cells))
    try:
        with (
            Schedule(jobs=jobs) as schedule,
            _Bar(output, plan) as bar,
        ):
            plan = plan.tuned(_tune(plan, schedule, bar, book))
            book.order = {id(cell): i for i, cell in enumerate(plan.cells)}
            book.draw_labels(plan.cells)

            def done(cell: Cell, row: Row, before: bool) -> None:
                book.add(cell, row)
                bar.step(cell, row, before=before)

            schedule.go(plan.cells, done)
    except KeyboardInterrupt as err:
        book.write(figures=True)
        raise Interrupted(
            f"stopped after {len(book.rows)} of {len(plan.cells)} runs; what is done is in {plan.out}, and the same "
            f"command goes on from there",
            terminated=isinstance(err, Terminated),
        ) from err
    book.write(figures=True)
    return _finish(plan, book.sorted(), output)


def _tune(plan: GridPlan, schedule: Any, bar: _Bar, book: Book) -> Any:
    from fedsplit.experiment.tuning import choose, write_tuning

    if not plan.trials:
        return {}
    found: dict[int, Row] = {}

    def done(cell: Cell, row: Row, before: bool) -> None:
        found[id(cell)] = row
        bar.step(cell, row, before=before, tuning=True)

    schedule.go([trial.cell for trial in plan.trials], done)
    rows = [found[id(trial.cell)] for trial in plan.trials]
    chosen = choose(plan.trials, rows)
    write_tuning(plan.out / "tuning.csv", plan.trials, rows, chosen)
    book.search_s = sum(row.seconds for row in rows)
    tried: dict[tuple[str, str], int] = {}
    for trial in plan.trials:
        tried[trial.method, trial.problem] = tried.get((trial.method, trial.problem), 0) + 1
    for (method, problem), settings in chosen.items():
        words = ", ".join(f"{k}={v}" for k, v in settings.items())
        where = f" on {problem}" if problem else ""
        book.tuned.append(
            f"{method}{where}: {words}, the best of {tried[method, problem]} candidates"
        )
    return chosen


class _Bar:
    """Rich's bar over all runs, with a line a run above it."""

    def __init__(self, output: Output, plan: GridPlan) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._output = output
        self._plan = plan
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True), console=output.stderr,
            # The ETA of a grid is of hours: rich's default looks at the last 30 s alone.
            speed_estimate_period=3600,
        )  # fmt: skip
        self._task = self._progress.add_task("runs", total=len(plan.to_run))

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, cell: Cell, row: Row, *, before: bool, tuning: bool = False) -> None:
        """A run is done: say so in a line, unless it is of a method that was not asked for."""
        if not self._plan.runs(cell.method):
            return
        line = line_of(cell, row, before=before, tuning=tuning)
        # One line a run, also where no terminal says how wide it is.
        self._output.stderr.print(Text(line), soft_wrap=True)
        self._progress.advance(self._task)


def line_of(cell: Cell, row: Row, *, before: bool = False, tuning: bool = False) -> str:
    """One finished run in one line."""
    from fedsplit.report.units import human_bytes, human_seconds, percent

    words = [f"{'tuning ' if tuning else ''}{cell}:"]
    if row.outcome == "failed":
        words.append(f"FAILED: {row.reason.splitlines()[0] if row.reason else 'no reason given'}")
    else:
        words.append(
            f"global {percent(row.accuracy_global)}, personal {percent(row.accuracy_personal)}, "
            f"{human_bytes(row.bytes_up)} up, {human_bytes(row.bytes_down)} down, {human_seconds(row.seconds)}"
        )
        if row.outcome == "partial":
            words.append(f"(partial: {row.reason})")
    if before:
        words.append("(done before)")
    return " ".join(words)


def _show_plan(plan: GridPlan, output: Output) -> None:
    from fedsplit.experiment.results import finished

    cells = plan.to_run
    done = {cell.run for cell in cells if finished(cell)}
    for cell in cells:
        output.note(f"{cell}{' (done)' if cell.run in done else ''}")
    runs = len({(cell.config.run.runs_dir, cell.run) for cell in cells})
    tuning = sum(plan.runs(trial.method) for trial in plan.trials)
    output.note(f"{runs} runs, {tuning} of them to tune; the grid has no faults that can be seen")
    output.result(
        {
            "experiment": plan.grid.experiment.name, "out": str(plan.out), "runs": runs,
            "tuning_runs": tuning, "done": sorted(done), "cells": [str(c) for c in cells],
        }
    )  # fmt: skip


def _finish(plan: GridPlan, rows: list[Row], output: Output) -> int:
    ours = [row for row in rows if plan.runs(row.method)]
    counts = {o: sum(r.outcome == o for r in ours) for o in ("complete", "partial", "failed")}
    code = 0 if counts["complete"] == len(ours) else 1 if counts["failed"] == len(ours) else 3
    text = (plan.out / "table.md").read_text(encoding="utf-8")
    # Not through rich, which would fold the table's rows.
    print(f"\n{text}\nFiles: {plan.out}", file=sys.stderr if output.as_json else sys.stdout)
    if code:
        output.note(
            f"{counts['failed']} runs failed, {counts['partial']} are partial; table.md says why"
        )
    output.result(
        {
            "experiment": plan.grid.experiment.name, "out": str(plan.out), "runs": len(ours), **counts,
            "exit_code": code, "results": [row.model_dump(mode="json") for row in rows],
        }
    )  # fmt: skip
    return code
