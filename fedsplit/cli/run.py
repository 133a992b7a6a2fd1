"""`fedsplit run`: `flwr run` with progress, a table and an exit code. `finish` is shared with `demo`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fedsplit.cli.console import Output

EXIT_CODES = {"complete": 0, "failed": 1, "partial": 3}

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")
]
AppOption = Annotated[
    Path | None,
    typer.Option(
        "--app", metavar="DIR", help="The Flower app; else the working directory or the checkout."
    ),
]


def _job(context: typer.Context, path: Path | None) -> Path | None:
    """A run file; `rounds=10` in its place is a slip."""
    if path is not None and "=" in path.name and not path.exists():
        raise click.UsageError(
            f"there is no file {path}; settings go behind --set, e.g. {context.command_path} --set {path}"
        )
    return path


JobArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[JOB.toml]",
        help="A run file: settings in tables, e.g. [train] rounds = 10.",
        callback=_job,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting, e.g. --set rounds=10; may be repeated."
    ),
]


def run(
    job: JobArgument = None,
    settings: SetOption = None,
    superlink: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A connection of your Flower config; else a simulation on this machine.",
        ),
    ] = None,
    federation: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The federation folder of this machine's server; runs at its sites."
        ),
    ] = None,
    from_last: Annotated[
        bool,
        typer.Option(
            "--from-last",
            help="With --federation: start from the module of the task's newest run that did not fail.",
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Go on with this run, from its last checkpoint."),
    ] = None,
    app: AppOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a federation: in simulation on this machine, at the sites of a federation folder, or on a SuperLink of yours.

    Exit codes: 0 complete, 3 partial (a site was left out), 1 failed, 2 wrong settings or data, 130 interrupted.
    """
    from fedsplit.cli.request import prepare
    from fedsplit.core.config import parse_set
    from fedsplit.core.config.run_file import read_run_file
    from fedsplit.plant.server.folder import FederationFolder

    if federation is not None and superlink is not None:
        raise click.UsageError("--federation and --superlink are two places; give one of them")
    if from_last and (federation is None or resume is not None):
        raise click.UsageError("--from-last goes with --federation DIR, and not with --resume")
    given = ({} if job is None else read_run_file(job)) | parse_set(settings or [])
    out = Output(as_json=as_json)
    folder = FederationFolder.at(federation) if federation is not None else None
    if folder is not None and from_last:
        given = _from_last(folder, given, out)
    with out.if_long("checking settings, backbone and data ..."):
        request = prepare(given, app=app, superlink=superlink, federation=folder, resume=resume)
    raise typer.Exit(run_request(request, out))


def _from_last(folder: Any, given: dict[str, Any], out: Output) -> dict[str, Any]:
    """The settings with the start-module that the folder's runs have left, if any."""
    from fedsplit.core.config import RunConfig
    from fedsplit.plant.server.runs import last_module

    if "start-module" in given:
        raise click.UsageError("--from-last chooses the start-module; leave that setting out")
    task = str(given.get("task") or folder.settings.run.get("task") or RunConfig().task.name)
    if (found := last_module(folder, task)) is None:
        out.note(f"no run of task {task} has left a module in {folder.runs}; this one starts anew")
        return given
    out.note(f"starts from {found}")
    return given | {"start-module": str(found)}


def run_request(request: Any, out: Output) -> int:
    """Execute a request, show its results, and return the exit code."""
    for warning in request.warnings:
        out.note(f"warning: {warning}")
    if request.told:
        out.note(f"recipe {request.config.run.recipe}:")
        for line in request.told:
            out.note(f"  {line}")
    from fedsplit.cli.execute import execute
    from fedsplit.cli.follow import Progress
    from fedsplit.core.records import TasksSummary

    with (
        Progress(out.stderr, untrained=request.config.untrained) as progress,
        _audited(request, out) as audit,
    ):
        ended = execute(request, progress)
        audit(ended)
    if isinstance(ended, TasksSummary):
        return finish_tasks(ended, request.run_dir, out)
    return finish(ended, request.run_dir, out)


def _audited(request: Any, out: Output) -> Any:
    """The run in the federation's audit log, if it is a federation folder's."""
    if request.federation is None:
        return nullcontext(lambda _ended: None)
    from fedsplit.plant.server.run_audit import audited

    return audited(request.federation, request.config.run.run_name, request.run_dir, out.note)


def finish(summary: Any, run_dir: Path, out: Output) -> int:
    """Show the table, see to the plots, print the JSON object, and return the exit code."""
    from fedsplit.report import exit_text, summary_view

    out.show(summary_view(summary))
    record = _record(summary, run_dir, out)
    _show_end(run_dir, out)
    code: int = record["exit_code"]
    if code and summary.rounds_done:
        # Said again below the tables, where it is read; without tables it stands there already.
        out.note(exit_text(summary))
    out.result(record)
    return code


def finish_tasks(summary: Any, run_dir: Path, out: Output) -> int:
    """The same for a run of several tasks: the tables of each, then one of all."""
    from fedsplit.report import tasks_exit_text, tasks_view

    out.show(tasks_view(summary))
    tasks = [_record(task, run_dir / task.task, out) for task in summary.tasks]
    _show_end(run_dir, out)
    outcomes = {task["outcome"] for task in tasks}
    outcome = next(o for o in ("failed", "partial", "complete") if o in outcomes)
    code = EXIT_CODES[outcome]
    if code:
        out.note(tasks_exit_text(summary))
    record = {
        "run": summary.run,
        "outcome": outcome,
        "run_dir": str(run_dir),
        "exit_code": code,
        "tasks": tasks,
    }
    if outcome == "failed":
        record["error"] = {"kind": "RunFailed", "message": tasks_exit_text(summary)}
    out.result(record)
    return code


def _show_end(run_dir: Path, out: Output) -> None:
    """How long the command took, Flower's start included, and where the files are."""
    import psutil

    from fedsplit.report.units import human_seconds

    taken = time.time() - psutil.Process().create_time()
    out.show(f"\nThe command took {human_seconds(taken)}, the start of Flower included.")
    if run_dir.is_dir():
        out.show(f"Files: {run_dir}")


def _record(summary: Any, run_dir: Path, out: Output) -> dict[str, Any]:
    """One run as a JSON object, its plots drawn."""
    from fedsplit.report import exit_text, lost_sites

    outcome = (
        "partial" if summary.outcome == "complete" and lost_sites(summary) else summary.outcome
    )
    plots = _plots(run_dir, summary.scoring.main, out) if summary.rounds_done else []
    record: dict[str, Any] = summary.model_dump(mode="json")
    record |= {
        "outcome": outcome,
        "run_dir": str(run_dir),
        "plots": [p.name for p in plots],
        "exit_code": EXIT_CODES[outcome],
    }
    if outcome == "failed":
        record["error"] = {"kind": "RunFailed", "message": exit_text(summary)}
    return record


def _plots(run_dir: Path, main: str, out: Output) -> list[Path]:
    """The run's plots, of its main score and its traffic, drawn now if the ServerApp did not."""
    from fedsplit.core.errors import ConfigError, RunDirError
    from fedsplit.core.extras import extra

    there = [run_dir / f"{name}.{kind}" for name in (main, "traffic") for kind in ("png", "svg")]
    if not all(path.is_file() for path in there) and run_dir.is_dir():
        try:
            with extra("server", "drawing a run's plots"):
                from fedsplit.report.plots import write_plots
            write_plots(run_dir)
        except (ConfigError, RunDirError) as err:
            out.note(f"no plots: {err}")
    return [path for path in there if path.is_file()]
