"""What a run's books say of the module that it left: a version's facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.records import SiteSummary, Summary
from fedsplit.core.scores import Scores
from fedsplit.registry.version import MAX_SITES, Facts, Setting, SiteFacts

PARENT = "start_module_sha256"
"""In a run's config.json: the digest of the module that it was started from."""
_MACHINES_OWN = (
    "runs-dir", "registry", "run-name", "resume", "encoder-address", "encoder-bind", "encoder-secret-file",
    "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "start-module",
)  # fmt: skip


def facts_of(
    summary: Summary,
    settings: Mapping[str, Any],
    *,
    parents: Iterable[str] = (),
    created: float = 0.0,
) -> Facts:
    """The facts of a run's module. `settings`: the run's, flat; paths of its machine are left out.

    Raises ConfigError where the run's records say what no version can.
    """
    scores = {**_scores(summary.scores), **_before(summary.scores_start)}
    kept = {
        key: value
        for key, value in settings.items()
        if key not in _MACHINES_OWN and isinstance(value, Setting)
    }
    try:
        return Facts(
            task=summary.task,
            run=summary.run,
            outcome=summary.outcome,
            fedsplit_version=summary.fedsplit_version,
            created=created,
            settings=kept,
            parents=tuple(p for p in parents if p),
            sites=tuple(_site(site) for site in summary.sites[:MAX_SITES]),
            metrics=scores,
            notes=tuple(printable(note, limit=4000) for note in summary.notes[:200]),
        )
    except ValueError as err:
        raise ConfigError(
            f"run {printable(summary.run)} cannot be kept as a version: {printable(err, limit=300)}"
        ) from err


def facts_of_folder(run_dir: Path) -> Facts:
    """The facts of a run that has ended, from its folder. Raises ConfigError."""
    try:
        text = (run_dir / "summary.json").read_text(encoding="utf-8")
        summary = Summary.model_validate_json(text)
        config = read_json(run_dir / "config.json")
        settings, parent = config["config"], config.get(PARENT, "")
        return facts_of(
            summary,
            settings,
            parents=[parent] if isinstance(parent, str) else [],
            created=(run_dir / "summary.json").stat().st_mtime,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"{run_dir} is not the folder of a run that has ended: {type(err).__name__}: {printable(err, limit=200)}; give a "
            f"run's folder with summary.json and config.json, or a file of `fedsplit module export`"
        ) from err


def _site(site: SiteSummary) -> SiteFacts:
    return SiteFacts(
        name=site.name,
        samples=site.samples,
        test_samples=site.test_samples,
        scores_before=_scores(site.scores_before),
        scores=_scores(site.scores),
        cut=site.cut,
        rounds_missed=site.rounds_missed,
    )


def _scores(scores: Scores | None) -> dict[str, float]:
    return dict(scores or {})


def _before(scores: Scores | None) -> dict[str, float]:
    return {f"{name}_before": value for name, value in (scores or {}).items()}
