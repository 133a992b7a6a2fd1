"""Runs one checked request in Flower from start to end: submit, follow, tell how it ended.

Owns what it starts: on every way out (end, error, Ctrl-C, SIGTERM) the run is stopped and no
process is left.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from fedsplit.cli.endings import Interrupted, RunFailedError, Terminated
from fedsplit.cli.flower import FlowerCommands, LocalSuperLink
from fedsplit.cli.follow import Progress, RunFiles, Snapshot, follow
from fedsplit.cli.request import RunRequest, to_toml
from fedsplit.cli.watch import LocalWatch, RemoteWatch, Watch
from fedsplit.core.cpus import usable_cpus
from fedsplit.core.errors import RunDirError
from fedsplit.core.processes import held_signals
from fedsplit.core.programs import flower_environment
from fedsplit.core.records import SUMMARY_MARK, TASKS_MARK, Summary, TasksSummary
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.report.read import read_summary, read_tasks

Ended = Summary | TasksSummary
_Record = TypeVar("_Record", Summary, TasksSummary)
_TYPED_ERROR = re.compile(r"^(?:\x1b\[\d+m)?fedsplit\.core\.errors\.(\w+): (.*)$", re.MULTILINE)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RAY_WAS_LATE = "The current node timed out during startup"


def execute(request: RunRequest, progress: Progress) -> Ended:
    """Run it and return its summary, or those of its tasks. Raises RunFailedError, FederationError or Interrupted."""
    files = RunFiles(request.run_dir)
    try:
        if request.superlink is not None:
            home = request.federation.flower_home if request.federation is not None else None
            commands = FlowerCommands(request.superlink, flower_environment(home))
            return _submit_and_follow(request, commands, files, progress, simulating=None)
        progress.say("starting Flower on this machine ...")
        with LocalSuperLink() as link:
            return _submit_and_follow(
                request, link.commands, files, progress, simulating=lambda: link.simulating
            )
    except Interrupted:
        raise
    except KeyboardInterrupt as err:
        # All that this run had started has ended, maybe in the middle of a file.
        RunDir(request.run_dir).clear_unfinished()
        raise Interrupted(
            _what_is_left(request, files), terminated=isinstance(err, Terminated)
        ) from err


def _submit_and_follow(
    request: RunRequest,
    commands: FlowerCommands,
    files: RunFiles,
    progress: Progress,
    *,
    simulating: Callable[[], bool] | None,
) -> Ended:
    run_id: str | None = None
    watch: Watch | None = None
    try:
        # Once Flower has the run its id must be known, or nobody could stop it.
        with held_signals() if simulating is None else contextlib.nullcontext():
            run_id = _submit(request, commands, local=simulating is not None)
        progress.say(
            f"run {request.config.run.run_name} is with Flower (id {run_id}); its sites are starting ..."
        )
        if simulating is not None:
            watch = LocalWatch(commands, run_id, simulating)
        else:
            watch = RemoteWatch(commands, run_id, files.run_dir, say=progress.say)
        snapshot = follow(files, progress, finished=watch)
    except KeyboardInterrupt as err:
        # Who asks twice gets the same good order.
        with held_signals(drop=True):
            stopped = run_id is not None and commands.stop(run_id)
        if simulating is None:
            raise Interrupted(
                _left_elsewhere(request, files, run_id, stopped=stopped),
                terminated=isinstance(err, Terminated),
            ) from err
        raise
    finally:
        if watch is not None:
            with held_signals(drop=True):
                watch.close()
    return _ending(request, commands, run_id, snapshot)


def _submit(request: RunRequest, commands: FlowerCommands, *, local: bool) -> str:
    federation = ""
    if local:
        # One CPU a site, and all CPUs for Ray: as many sites run at once as there are CPUs.
        federation = (
            f"num-supernodes={request.config.server.sites} client-resources-num-cpus=1 "
            f"init-args-num-cpus={usable_cpus()}"
        )
    with tempfile.TemporaryDirectory(prefix="fs-") as folder:
        path = Path(folder) / "run.toml"
        path.write_text(to_toml(request.overrides), encoding="utf-8")
        app = request.app.stage(Path(folder) / "app")
        return commands.start(app, path, federation)


def _ending(
    request: RunRequest, commands: FlowerCommands, run_id: str, snapshot: Snapshot
) -> Ended:
    if snapshot.summarised:
        return _read(request)
    log = _ANSI.sub("", commands.log(run_id))
    summary = tasks_in_log(log) if request.config.task.tasks else summary_in_log(log)
    if summary is not None:
        return summary
    status = snapshot.status
    if status is not None and status.phase == "failed" and status.message:
        raise RunFailedError(status.message)
    kind, message = error_in_log(log)
    if kind:
        raise RunFailedError(message, kind=kind)
    state = commands.state(run_id)
    if state.status == "finished:completed":
        raise RunFailedError(
            f"Flower says that run {run_id} is complete, but its summary is neither in {request.run_dir} nor in "
            "its log, so whether all sites took part is not known here; look on the ServerApp's machine"
        )
    raise RunFailedError(f"the run ended as {state.status!r} without a summary.\n{message}")


def _read(request: RunRequest) -> Ended:
    return (read_tasks if request.config.task.tasks else read_summary)(request.run_dir)


def summary_in_log(log: str) -> Summary | None:
    """The summary that the ServerApp wrote into its log as its last word, if it is there and whole."""
    return _in_log(log, SUMMARY_MARK, Summary)


def tasks_in_log(log: str) -> TasksSummary | None:
    """The same of a run of several tasks."""
    return _in_log(log, TASKS_MARK, TasksSummary)


def _in_log(log: str, mark: str, kind: type[_Record]) -> _Record | None:
    for line in reversed(_ANSI.sub("", log).splitlines()):
        _, found, text = line.partition(f"{mark} ")
        if found:
            try:
                return kind.model_validate_json(text)
            except ValidationError:
                return None
    return None


def error_in_log(log: str, lines: int = 15) -> tuple[str, str]:
    """(kind, message) of the last typed error in a run's log, else ("", the log's last useful lines)."""
    log = _ANSI.sub("", log)
    hits = list(_TYPED_ERROR.finditer(log))
    if hits:
        # A message may go on over lines that are indented; anything else belongs to someone else.
        rest = log[hits[-1].end() :].splitlines()[1:]
        more = []
        for line in rest:
            if not line.startswith("  "):
                break
            more.append(line)
        return hits[-1].group(1), "\n".join([hits[-1].group(2), *more])
    if _RAY_WAS_LATE in log:
        return "FederationError", (
            "Ray, which runs the simulated sites, was not up within the time that it gives itself, so nothing was "
            "trained. Most often the machine has too much else to do: run the same command when a core is free"
        )
    useful = [
        line.rstrip() for line in log.splitlines() if line.strip() and "Exit Code" not in line
    ]
    return "", "\n".join(useful[-lines:]) or "The run's log is empty."


def _left_elsewhere(
    request: RunRequest, files: RunFiles, run_id: str | None, *, stopped: bool
) -> str:
    """What a run on another's SuperLink leaves when this command is stopped, and how to go on."""
    link = request.superlink
    if request.federation is not None:
        link = f"{link} (with FLWR_HOME={request.federation.flower_home})"
    if run_id is None:
        return "stopped before the run was with Flower; nothing was started"
    if files.snapshot().summarised:
        return _what_is_left(request, files)
    if not stopped:
        return (
            f"Flower could not be told to stop the run, which may go on. To look: flwr list {link}. To stop it: "
            f"flwr stop {run_id} {link}"
        )
    told = "Flower was told to stop the run; its processes on the server and at the sites end within about a minute."
    if not request.run_dir.exists():
        return (
            f"{told} Its folder is on the ServerApp's machine. To go on from its last checkpoint, if it has one: "
            f"{_resume_command(request)}"
        )
    return f"{told}\n{_what_is_left(request, files)}"


def _what_is_left(request: RunRequest, files: RunFiles) -> str:
    """What a stopped run leaves, and how to go on."""
    if files.snapshot().summarised:
        try:
            summary = _read(request)
        except RunDirError:
            pass
        else:
            if summary.outcome == "complete":
                return f"stopped after the run's end; its results are in {request.run_dir}"
    if not request.run_dir.exists():
        return "stopped before the run began; nothing was written"
    folders = [
        request.run_dir / name
        for name in (request.config.task.sources if request.config.task.tasks else [""])
    ]
    if not any(any(folder.glob("checkpoints/round-*")) for folder in folders):
        return f"stopped before the first round was through; nothing to go on from in {request.run_dir}"
    return (
        f"stopped; what was done so far is in {request.run_dir}. "
        f"To go on from its last checkpoint: {_resume_command(request)}"
    )


def _resume_command(request: RunRequest) -> str:
    return f"fedsplit run {request.where}--resume {request.config.run.run_name}"
