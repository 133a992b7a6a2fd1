"""How a federation stands now: its services, its sites, the run that goes on and those that ended. Reads files only.

The terminal (`fedsplit status`), the page and the metrics all show what stands here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedsplit.core.errors import FedsplitError, RunDirError
from fedsplit.core.foreign import read_json
from fedsplit.core.records import RoundMetrics, Status, Summary
from fedsplit.core.scores import added, scoring_of
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry, SiteRow
from fedsplit.plant.server.runs import ServiceState, present
from fedsplit.plant.server.usage import drift
from fedsplit.plant.wire import DayUsage, Report
from fedsplit.registry.registry import ModuleRegistry, is_registry
from fedsplit.report.read import read_metrics, read_status, read_summary

SLEEPS_AFTER_S = 60.0
"""A site reports every few seconds; silent for so long, it sleeps or is cut off."""
SHOWN_RUNS, SHOWN_DAYS = 10, 30
SiteLight = Literal["invited", "idle", "working", "late", "failing", "sleeping", "refused"]


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class UsageStatus(_Shown):
    """What a module answered in a day at a site."""

    day: str
    """UTC."""
    module: str
    samples: int
    confidence: float
    """Mean of the probabilities of the classes that were answered."""
    classes: dict[str, int] = {}
    """Class -> how often it was answered; the most frequent ones."""


class SiteStatus(_Shown):
    """One site as it stands."""

    name: str
    state: SiteLight
    """invited: it has a code and has not joined. sleeping: no report for a minute. refused: revoked. late: the others have answered."""
    detail: str = ""
    last_seen_s: float | None = None
    """Seconds since its last report; None: never."""
    fedsplit_version: str = ""
    rss_bytes: int = 0
    disk_free_bytes: int = 0
    backbone_loads: int = 0
    certificate_ends: float = 0.0
    """Seconds since the epoch."""
    round: int = 0
    """The last round of the present run in which it answered."""
    bytes_up: int = 0
    bytes_down: int = 0
    steps_per_s: float = 0.0
    """Of its last round."""
    module: str = ""
    """TASK#NUMBER of the module that it uses, or the digest where the registry does not know it; empty: none."""
    module_fault: str = ""
    """Why the module in production is not in use there."""
    drift: str = ""
    """How the module's answers of the last days leave what it answered on the site's own test samples; empty: they do not."""
    usage: tuple[UsageStatus, ...] = ()
    """What its modules answered, oldest day first."""


class RunStatus(_Shown):
    """One run."""

    name: str
    task: str = ""
    phase: str
    """As in status.json; complete, partial or failed once it has ended."""
    round: int = 0
    rounds: int = 0
    sites: tuple[str, ...] = ()
    replied: tuple[str, ...] = ()
    score: float | None = None
    """The main score of the module of the last round, over all sites: accuracy, or R2 of numbers."""
    score_name: str = ""
    bytes: int = 0
    """Moved in all."""
    started: float = 0.0
    """Seconds since the epoch."""
    seconds: float = 0.0
    """So far, or in all."""
    left_s: float | None = None
    """About how long it still takes; None where nobody can say."""
    message: str = ""
    left_out: tuple[str, ...] = ()
    """Sites that missed a round."""


class EncoderStatus(_Shown):
    """What the encoder counts since its start, and what is live."""

    live_sessions: int = 0
    kept_bytes: int = 0
    """Graphs that wait for their gradients."""
    sessions: int = 0
    encoded: int = 0
    backpropped: int = 0
    predicted: int = 0
    """Samples of sites that predict."""
    published: int = 0
    refused: dict[str, int] = {}
    rss_bytes: int = 0


class FederationStatus(_Shown):
    """All of it."""

    address: str
    up: bool
    message: str = ""
    """Why it is not up."""
    services: dict[str, str] = {}
    """Service -> up, starting or down."""
    restarts: dict[str, int] = {}
    encoder: EncoderStatus | None = None
    """None where it is not up."""
    sites: tuple[SiteStatus, ...] = ()
    run: RunStatus | None = None
    """The one that goes on."""
    ended: tuple[RunStatus, ...] = ()
    """The last ones, newest first."""
    time: float
    """Seconds since the epoch, on the server."""


def federation_status(folder: FederationFolder) -> FederationStatus:
    """How everything stands. Raises ConfigError for a folder that cannot be read."""
    settings = folder.settings.server
    why, services = "", dict[str, ServiceState]()
    try:
        services = present(folder).services
    except FedsplitError as err:
        why = str(err)
    paths = _run_folders(folder)
    busy = next((path for path in paths if RunDir(path).busy), None)
    metrics = _metrics(busy)
    run = _going_on(busy, metrics) if busy is not None else None
    with Registry(folder) as registry:
        rows = registry.sites()
        usage = {row.name: registry.usage(row.name, most=SHOWN_DAYS) for row in rows}
    names = module_names(folder)
    return FederationStatus(
        address=f"{settings.host}:{settings.port}",
        up=not why,
        message=why,
        services={name: one.state for name, one in services.items()},
        restarts={name: one.restarts for name, one in services.items()},
        encoder=_encoder(folder) if services.get("encoder", ServiceState()).state == "up" else None,
        sites=tuple(
            _with_module(_site(row, run, metrics), row.report, usage[row.name], names)
            for row in rows
        ),
        run=run,
        ended=tuple(
            r for path in paths[:SHOWN_RUNS] if path != busy and (r := _ended(path)) is not None
        ),
        time=time.time(),
    )


def _encoder(folder: FederationFolder) -> EncoderStatus | None:
    try:
        return EncoderStatus.model_validate(read_json(folder.encoder_stats, limit=1 << 20))
    except (OSError, ValueError):
        return None


def _run_folders(folder: FederationFolder) -> list[Path]:
    """The run folders, newest first."""
    found = [(p.stat().st_mtime, p.parent) for p in folder.runs.glob("*/config.json")]
    return [path for _, path in sorted(found, reverse=True)]


def _metrics(path: Path | None) -> Sequence[RoundMetrics]:
    try:
        return read_metrics(path) if path is not None else ()
    except RunDirError:
        return ()


def _going_on(path: Path, metrics: Sequence[RoundMetrics]) -> RunStatus:
    try:
        status = read_status(path)
    except RunDirError:
        status = Status(phase="waiting", round=0, rounds=0, sites=(), replied=())
    started = (path / "config.json").stat().st_mtime
    seconds = max(0.0, time.time() - started)
    done = max(0, status.round - 1)
    name, score = _score(metrics)
    return RunStatus(
        name=path.name,
        task=status.task,
        phase=status.phase,
        round=status.round,
        rounds=status.rounds,
        sites=status.sites,
        replied=status.replied,
        score=score,
        score_name=name,
        bytes=sum(map(_moved, metrics)),
        started=started,
        seconds=seconds,
        left_s=seconds / done * (status.rounds - done) if done else None,
        message=status.message,
    )


def _ended(path: Path) -> RunStatus | None:
    """A run that has left its summary; None where it has none that can be read."""
    try:
        summary: Summary = read_summary(path)
    except RunDirError:
        return None
    main = summary.scoring.main
    return RunStatus(
        name=path.name,
        task=summary.task,
        phase=summary.outcome,
        round=summary.rounds_done,
        rounds=summary.rounds,
        sites=tuple(site.name for site in summary.sites),
        score=(summary.scores or {}).get(main),
        score_name=main,
        bytes=summary.bytes_activation + summary.bytes_module,
        started=(path / "config.json").stat().st_mtime,
        seconds=summary.wall_s,
        message=summary.reason,
        left_out=tuple(sorted({left.site for left in summary.left_out})),
    )


def _score(metrics: Sequence[RoundMetrics]) -> tuple[str, float | None]:
    tested = [m for m in metrics if m.test_samples]
    if not tested:
        return "", None
    latest = max(m.round for m in tested)
    scoring = scoring_of(tested[0].sums_global)
    scores = scoring.scores(added(m.tested for m in tested if m.round == latest)) or {}
    return scoring.main, scores.get(scoring.main)


def _site(row: SiteRow, run: RunStatus | None, metrics: Sequence[RoundMetrics]) -> SiteStatus:
    mine = [m for m in metrics if m.site == row.name]
    last = mine[-1] if mine else None
    silent = time.time() - row.last_seen if row.last_seen else None
    report = row.report
    state, detail = _light(row, silent, run)
    took = last.seconds_device + last.seconds_wait if last else 0.0
    return SiteStatus(
        name=row.name,
        state=state,
        detail=detail,
        last_seen_s=silent,
        fedsplit_version=report.fedsplit_version if report else "",
        rss_bytes=report.rss_bytes if report else 0,
        disk_free_bytes=report.disk_free_bytes if report else 0,
        backbone_loads=report.backbone_loads if report else 0,
        certificate_ends=row.certificate_ends,
        round=last.round if last else 0,
        bytes_up=sum(m.bytes_activation_up + m.bytes_module_up for m in mine),
        bytes_down=sum(m.bytes_activation_down + m.bytes_module_down for m in mine),
        steps_per_s=last.steps / took if last and took else 0.0,
    )


def _with_module(
    site: SiteStatus, report: Report | None, usage: Sequence[DayUsage], names: Mapping[str, str]
) -> SiteStatus:
    """The site with the module that it uses, and what that has answered."""
    module = report.module if report else None
    days = tuple(
        UsageStatus(
            day=one.day,
            module=names.get(one.module, one.module[:12]),
            samples=one.answered.samples,
            confidence=one.answered.confidence / max(1, one.answered.samples),
            classes=one.answered.classes,
        )
        for one in usage
    )
    if report is None or module is None:
        return site.model_copy(update={"usage": days})
    return site.model_copy(
        update={
            "module": names.get(module.digest, module.digest[:12]),
            "module_fault": module.fault,
            "drift": drift(report),
            "usage": days,
        }
    )


def module_names(folder: FederationFolder) -> dict[str, str]:
    """Digest -> TASK#NUMBER of all versions; nothing where the registry cannot be read."""
    if not is_registry(folder.modules):
        return {}
    try:
        with ModuleRegistry.open(folder.modules) as registry:
            return {version.digest: version.name for version in registry.versions()}
    except FedsplitError:
        return {}


def _light(row: SiteRow, silent: float | None, run: RunStatus | None) -> tuple[SiteLight, str]:
    """The state that is shown, and a word on it."""
    if row.state == "revoked":
        return "refused", "revoked; it may join again with a new code"
    if row.state == "invited":
        return "invited", "it has not joined yet"
    if silent is None or silent > SLEEPS_AFTER_S:
        return "sleeping", "no report; it comes back by itself"
    report = row.report
    if report is not None and report.state == "failing":
        return "failing", report.detail
    if run is not None and run.phase in ("training", "evaluating") and row.name in run.sites:
        if row.name in run.replied:
            return "idle", f"round {run.round} is done"
        others = len(run.replied) * 2 >= len(run.sites)
        return ("late" if others else "working"), (report.detail if report else "")
    working = report is not None and report.state == "working"
    return ("working" if working else "idle"), (report.detail if report else "")


def _moved(m: RoundMetrics) -> int:
    return m.bytes_activation_up + m.bytes_activation_down + m.bytes_module_up + m.bytes_module_down
