"""A run of the federation in its audit log: who started it, how it ended, with which sites, and which module came of it."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.core.errors import FedsplitError, FolderError
from fedsplit.core.records import Summary, TasksSummary
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.registry.module_files import module_digest

Ended = Summary | TasksSummary


@contextmanager
def audited(
    folder: FederationFolder, run: str, run_dir: Path, say: Callable[[str], None]
) -> Iterator[Callable[[Ended], None]]:
    """The run that goes on in the block, whose summary is given to what this yields.

    Raises FolderError where its start cannot be recorded; an end that cannot be is said, for the run itself is done.
    """
    audit.record(folder, "run-started", "server", run=run, by=_who())
    ends: list[Ended] = []
    try:
        yield ends.append
    except BaseException as err:
        why = str(err) if isinstance(err, FedsplitError) else type(err).__name__
        with contextlib.suppress(FolderError):
            audit.record(folder, "run-ended", "server", run=run, outcome="failed", reason=why)
        raise
    try:
        for ended in ends:
            several = isinstance(ended, TasksSummary)
            for one in ended.tasks if isinstance(ended, TasksSummary) else (ended,):
                _record(folder, one, run_dir / one.task if several else run_dir)
    except FolderError as err:
        say(f"warning: the end of this run is not in the audit log: {err}")


def _record(folder: FederationFolder, summary: Summary, run_dir: Path) -> None:
    audit.record(
        folder,
        "run-ended",
        "server",
        run=summary.run,
        task=summary.task,
        outcome=summary.outcome,
        reason=summary.reason,
        rounds=summary.rounds_done,
        sites=[site.name for site in summary.sites],
        left_out=[one.site for one in summary.left_out],
        backbone_sha256=summary.backbone_sha256,
        module_sha256=_digest(run_dir / summary.module) if summary.module else "",
    )


def _digest(module: Path) -> str:
    """The module's digest, as the registry of modules has it; empty where there is no module."""
    with contextlib.suppress(FedsplitError):
        if module.is_dir():
            return module_digest(module)
    return ""


def _who() -> str:
    """The account that started it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
