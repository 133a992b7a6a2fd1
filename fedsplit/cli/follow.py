"""Follows a run by the files it writes and shows how far it is.

`RunFiles` turns a run's folder into snapshots, `Progress` shows them, `follow` goes round until the
run has ended, whichever of its files or Flower says so. Reads only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fedsplit.core.errors import RunDirError
from fedsplit.core.records import RoundMetrics, Status
from fedsplit.core.scores import Tally, added, scoring_of
from fedsplit.report.read import read_metrics, read_status
from fedsplit.report.scores import title, whole

_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the files say now."""

    status: Status | None
    metrics: tuple[RoundMetrics, ...]
    summarised: bool

    @property
    def over(self) -> bool:
        """The app has said its last word."""
        return (
            self.summarised and self.status is not None and self.status.phase in {"done", "failed"}
        )

    @property
    def done(self) -> int:
        """Replies that are in, over all rounds and the last evaluation."""
        if self.status is None or (self.status.round == 0 and self.status.phase != "done"):
            return 0
        sites = len(self.status.sites)
        if self.status.phase == "done":
            return self.total
        return min(self.total, max(0, self.status.round - 1) * sites + len(self.status.replied))

    @property
    def total(self) -> int:
        return len(self.status.sites) * (self.status.rounds + 1) if self.status else 0

    def tested(self) -> tuple[int, Tally, int] | None:
        """(rounds trained, test, sites that answered) of the latest module tested so far."""
        tested = [m for m in self.metrics if m.test_samples]
        if not tested:
            return None
        latest = max(m.round for m in tested)
        lines = [m for m in tested if m.round == latest]
        return latest - 1, added(m.tested for m in lines), len(lines)


class RunFiles:
    """A run's folder, which may not exist yet. What lies there already (a resumed run's) does not count."""

    # In the order opposite to the app's writing, so that what is read last is at least as new as the rest.
    _NAMES = ("summary.json", "tasks.json", "status.json", "metrics.jsonl")

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._seen = {name: self._mark(name) for name in self._NAMES}
        self._last = Snapshot(None, (), False)

    def snapshot(self) -> Snapshot:
        """The present state; a file that is being replaced or is damaged keeps its last good content.

        The same object as before where no file has changed.
        """
        status, metrics, summarised = self._last.status, self._last.metrics, self._last.summarised
        for name in self._NAMES:
            mark = self._mark(name)
            if mark is None or mark == self._seen[name]:
                continue
            try:
                if name == "metrics.jsonl":
                    metrics = read_metrics(self.run_dir)
                elif name == "status.json":
                    status = read_status(self.run_dir)
                else:
                    summarised = True
            except RunDirError:
                continue
            self._seen[name] = mark
            self._last = Snapshot(status, metrics, summarised)
        return self._last

    def _mark(self, name: str) -> tuple[int, int, int] | None:
        try:
            stat = (self.run_dir / name).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


class Progress:
    """Snapshots as a bar on a terminal, or as a line a change of round elsewhere. A context manager."""

    def __init__(self, console: Console, *, untrained: bool = False) -> None:
        """`untrained`: the run's classifier starts from zero, so that its score before training says nothing."""
        self._console = console
        self._untrained = untrained
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed:.0f}/{task.total:.0f} replies"),
            TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("| left"), TimeRemainingColumn(),
            TextColumn("| {task.fields[score]}"),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starting Flower", total=1, completed=0, score="")
        self._said = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Bring the display up to date."""
        status = snapshot.status
        if status is None:
            return
        where = _where(status)
        text = _score_text(snapshot, untrained=self._untrained)
        self._bar.update(
            self._task,
            description=where,
            completed=snapshot.done,
            total=max(1, snapshot.total),
            score=text,
        )
        # A round that begins is news; so is the end, even if its round's number was said before.
        in_round = status.phase in {"training", "evaluating"}
        line = f"{status.task} round {status.round}" if in_round else where
        if not self._console.is_terminal and line != self._said:
            self._said = line
            self._console.print(f"{where}{'; ' if text else ''}{text}", markup=False)

    def say(self, message: str) -> None:
        """A word on what is going on before the run's files are there."""
        self._bar.update(self._task, description=message)
        if not self._console.is_terminal:
            self._console.print(message, markup=False)


def _where(status: Status) -> str:
    """Where the run stands, in words, and whose turn it is where tasks take turns."""
    return f"{status.task}: {_stage(status)}" if status.task else _stage(status)


def _stage(status: Status) -> str:
    if status.phase == "training" and status.round == 0:
        return status.message or "each site trains alone, to compare"
    if status.phase == "training":
        return f"round {status.round} of {status.rounds}"
    names = {"evaluating": "last evaluation", "done": "done", "failed": "failed"}
    return names.get(status.phase, status.message or f"{status.phase} ...")


def _score_text(snapshot: Snapshot, *, untrained: bool) -> str:
    latest = snapshot.tested()
    if latest is None:
        return ""
    trained, test, sites = latest
    scoring = scoring_of(test.sums)
    name = title(scoring.main)
    when = (
        f"after {trained} {'round' if trained == 1 else 'rounds'}" if trained else "before training"
    )
    if untrained and not trained:
        return f"{name} {when}: untrained"
    where = f"{test.samples} test samples, {sites} {'site' if sites == 1 else 'sites'}"
    return f"{name} {when}: {whole(scoring.scores(test), scoring)} ({where})"


def follow(
    files: RunFiles,
    progress: Progress,
    *,
    finished: Callable[[Snapshot], bool],
    linger_s: float = 20.0,
) -> Snapshot:
    """Show progress until `finished` (Flower's word) or, `linger_s` after the summary, without it."""
    over_since: float | None = None
    while True:
        ended = finished(files.snapshot())
        # Read once more after Flower's word: the app's last files may have come in between.
        snapshot = files.snapshot()
        progress.show(snapshot)
        if snapshot.over and over_since is None:
            over_since = time.monotonic()
        if ended or (over_since is not None and time.monotonic() - over_since > linger_s):
            return snapshot
        time.sleep(_POLL_S)
