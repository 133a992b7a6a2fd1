"""What a report is about: a run's files as they are, also while it goes on, and several runs of a federation.

Each task of a run is a `Part`. A run without a summary gets one from its metrics so far. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsplit import __version__
from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.records import RoundMetrics, SiteSummary, Status, Summary
from fedsplit.core.scores import Scores, added
from fedsplit.registry.version import Promotion, Version
from fedsplit.report.read import read_metrics, read_status, read_summary, read_tasks


@dataclass(frozen=True)
class Confusion:
    """[true class][predicted class]: counts over the test samples of all sites."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """One task of a run."""

    folder: Path
    summary: Summary
    metrics: tuple[RoundMetrics, ...]
    config: Mapping[str, Any]
    """Settings, flat; empty where config.json cannot be read."""
    classes: tuple[str, ...]
    scale: Mapping[str, float]
    versions: Mapping[str, str]
    status: Status | None
    """Where it stands; None once it has ended."""
    confusion: Confusion | None = None

    @property
    def going_on(self) -> bool:
        """Is there no summary yet?"""
        return self.status is not None


@dataclass(frozen=True)
class Run:
    """A run: one part, or one a task."""

    name: str
    folder: Path
    parts: tuple[Part, ...]
    ended: datetime
    """When its files were last written."""
    by: str = ""
    """The account that started it, where an audit log says so."""

    @property
    def seconds(self) -> float:
        """From the roll call to the last test, of all tasks."""
        return sum(part.summary.wall_s for part in self.parts)


@dataclass(frozen=True)
class Subject:
    """What one report is about."""

    title: str
    runs: tuple[Run, ...]
    """Newest first."""
    federation: bool = False
    since: str = ""
    audit: Sequence[Mapping[str, Any]] = field(default=())
    """Lines of the federation's audit log, of the time that the report covers."""
    unread: tuple[str, ...] = ()
    """Runs whose files cannot be read, each with the reason."""
    versions: tuple[Version, ...] = ()
    """What the registry of modules has of these runs."""
    moves: tuple[Promotion, ...] = ()
    """How its aliases moved, oldest first."""

    @property
    def told(self) -> tuple[tuple[Run, Part], ...]:
        """What is told in detail: all tasks of the one run, or the newest good part of each task of a federation."""
        every = [(run, part) for run in self.runs for part in run.parts]
        if not self.federation:
            return tuple(every)
        good = [(r, p) for r, p in every if p.summary.outcome != "failed" and not p.going_on]
        newest: dict[str, tuple[Run, Part]] = {}
        for run, part in good or every[:1]:
            newest.setdefault(part.summary.task, (run, part))
        return tuple(newest.values())


def read_run(folder: Path, *, by: str = "") -> Run:
    """A run's folder. Raises RunDirError where it is none, or of a version that this one cannot read."""
    if not (folder / "config.json").is_file() and not (folder / "summary.json").is_file():
        raise RunDirError(_no_run(folder))
    config = _config(folder)
    names = _tasks(folder)
    parts = [_part(folder / name if name else folder, config, name) for name in names]
    if not any(parts):
        raise RunDirError(
            f"run {printable(folder.name)} has neither a summary nor a line of metrics yet; wait until its first round is "
            "through, or see `fedsplit status`"
        )
    stamps = [p.stat().st_mtime for p in folder.rglob("*.json*") if p.is_file()]
    ended = datetime.fromtimestamp(max(stamps), UTC)
    return Run(folder.name, folder, tuple(p for p in parts if p is not None), ended, by)


def _no_run(folder: Path) -> str:
    shown = printable(folder)
    near = (
        sorted(p.parent.name for p in folder.glob("*/config.json"))[:10]
        or sorted(p.parent.name for p in folder.parent.glob("*/config.json"))[:10]
    )
    if (folder / "federation.toml").is_file():
        return (
            f"{shown} is a federation folder; report it with `fedsplit report --federation {shown}`"
        )
    what = "has no config.json, so it is no run's folder" if folder.is_dir() else "is not there"
    return f"{shown} {what}; give the folder of a run" + (
        f", such as one of these: {', '.join(map(printable, near))}" if near else ""
    )


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tasks(folder: Path) -> list[str]:
    """The folders of its tasks; one empty name where it is a run of one."""
    if (folder / "tasks.json").is_file():
        return [task.task for task in read_tasks(folder).tasks]
    if (folder / "summary.json").is_file() or (folder / "metrics.jsonl").is_file():
        return [""]
    several = sorted(p.parent.name for p in folder.glob("*/metrics.jsonl"))
    return several or [""]


def _part(folder: Path, whole: Mapping[str, Any], task: str) -> Part | None:
    own = _config(folder) or whole
    config = own.get("config") if isinstance(own.get("config"), dict) else {}
    classes = own.get("classes")
    classes = tuple(printable(c, limit=200) for c in classes) if isinstance(classes, list) else ()
    metrics = _metrics(folder)
    summary, status = None, None
    if (folder / "summary.json").is_file():
        summary = _summary(folder)
    elif metrics:
        status = _status(folder)
        summary = _so_far(folder, config or {}, own, metrics, status, task)
    if summary is None:
        return None
    return Part(
        folder=folder,
        summary=summary,
        metrics=metrics,
        config=config or {},
        classes=classes,
        scale=_words(own.get("scale")),
        versions=_words(own.get("versions")),
        status=status,
        confusion=_confusion(summary, classes),
    )


def _summary(folder: Path) -> Summary:
    try:
        return read_summary(folder)
    except RunDirError as err:
        try:
            raw = read_json(folder / "summary.json")
            version = str(raw["fedsplit_version"]) if isinstance(raw, dict) else ""
        except (OSError, ValueError, KeyError):
            version = ""
        if version and version != __version__:
            raise RunDirError(
                f"run {printable(folder.name)} is of fedsplit {printable(version, limit=40)}, this is {__version__}, "
                f"and its summary reads otherwise ({err}); make the report with that version"
            ) from err
        raise


def _metrics(folder: Path) -> tuple[RoundMetrics, ...]:
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else ()


def _status(folder: Path) -> Status:
    for at in (folder, folder.parent):
        if (at / "status.json").is_file():
            return read_status(at)
    return Status(phase="starting", round=0, rounds=0, sites=(), replied=())


def _words(raw: Any) -> dict[str, Any]:
    return {printable(k, limit=60): v for k, v in raw.items()} if isinstance(raw, dict) else {}


def _confusion(summary: Summary, classes: tuple[str, ...]) -> Confusion | None:
    """The last test's, where the run kept one of the size of its classes."""
    raw = getattr(summary, "confusion", None)
    if not raw or len(raw) != len(classes):
        return None
    return Confusion(classes, tuple(tuple(int(n) for n in row) for row in raw))


def _so_far(
    folder: Path,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    metrics: Sequence[RoundMetrics],
    status: Status,
    task: str,
) -> Summary:
    """A summary of a run that goes on, from what its sites have sent."""
    scoring = metrics[-1].scoring
    done = max((m.round for m in metrics), default=1)
    curve: list[Scores] = []
    for number in range(1, done + 1):
        scores = scoring.scores(added(m.tested for m in metrics if m.round == number))
        if scores is not None:
            curve.append(scores)
    names = sorted({m.site for m in metrics})
    return Summary(
        run=folder.parent.name if task else folder.name,
        task=task or str(config.get("task", "")),
        method=str(config.get("method", "")),
        backbone=str(config.get("backbone", "")),
        backbone_sha256=str(own.get("backbone_sha256", "")),
        fedsplit_version=str(_words(own.get("versions")).get("fedsplit", "")),
        rounds=status.rounds,
        rounds_done=max(0, done - 1),
        sites=tuple(_site(name, [m for m in metrics if m.site == name]) for name in names),
        target=scoring.target,
        scores=curve[-1] if curve else None,
        scores_start=curve[0] if curve else None,
        scores_by_round=tuple(curve),
        bytes_activation=sum(m.bytes_activation_up + m.bytes_activation_down for m in metrics),
        bytes_module=sum(m.bytes_module_up + m.bytes_module_down for m in metrics),
        bytes_full_model=0,
        wall_s=0.0,
        outcome="partial",
        left_out=(),
        reason="",
        module="",
    )


def _site(name: str, lines: Sequence[RoundMetrics]) -> SiteSummary:
    scoring = lines[-1].scoring
    tested = [m for m in sorted(lines, key=lambda m: m.round) if m.test_samples]
    return SiteSummary(
        name=name,
        cut=lines[-1].cut,
        samples=max(m.samples for m in lines),
        test_samples=tested[-1].test_samples if tested else 0,
        target=scoring.target,
        scores_before=scoring.scores(tested[0].tested) if tested else None,
        scores=scoring.scores(tested[-1].tested) if tested else None,
        bytes_up=sum(m.bytes_activation_up + m.bytes_module_up for m in lines),
        bytes_down=sum(m.bytes_activation_down + m.bytes_module_down for m in lines),
        seconds_device=sum(m.seconds_device for m in lines),
        seconds_wait=sum(m.seconds_wait for m in lines),
        peak_rss_bytes=max(m.peak_rss_bytes for m in lines),
        rounds_missed=0,
    )
