"""Whether a version may go into production: `[promotion]` in federation.toml, judged by what the sites measured.

The measuring is a run that trains nothing, one of the version and one of what is in production (cli/promote.py starts them);
each site tests with its own test samples, which never leave it. Nothing is decided here but by these scores.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.config.run_config import FIELDS
from fedsplit.core.errors import BackboneError, ConfigError
from fedsplit.core.foreign import printable
from fedsplit.core.records import Summary
from fedsplit.model.module import load_exported, load_inputs
from fedsplit.plant.server.folder import FederationFolder, PromotionSection
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.runs import Flat
from fedsplit.plant.server.status import SLEEPS_AFTER_S

_MAX_RANK = 1024
_KEPT_SECTIONS = ("link",)
_KEPT_KEYS = (
    "cut", "text-column", "label-column", "pixel-max", "broken-files", "test-fraction", "max-samples", "deadline-s",
    "batch-size",
)  # fmt: skip
_TINY = 1e-9


@dataclass(frozen=True)
class Fleet:
    """The members that have data of a task, by their last reports."""

    up: tuple[str, ...]
    away: tuple[str, ...]
    """Silent for a minute; among them those that never said their task."""


@dataclass(frozen=True)
class Measured:
    """What one version reached."""

    name: str
    """TASK#NUMBER."""
    score: str
    """Name of the score: accuracy, or R2 of numbers."""
    sites: Mapping[str, tuple[float, int]]
    """Site -> (score, test samples)."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Site -> why it has no score."""

    @classmethod
    def of(cls, name: str, summary: Summary) -> Measured:
        """Those of a run that trained nothing."""
        main = summary.scoring.main
        found, missing = {}, {}
        for site in summary.sites:
            score = (site.scores or {}).get(main)
            if score is None:
                missing[site.name] = "it did not test"
            else:
                found[site.name] = (score, site.test_samples)
        for left in summary.left_out:
            found.pop(left.site, None)
            missing[left.site] = left.reason
        return cls(name, main, found, missing)


@dataclass(frozen=True)
class Verdict:
    """May it be promoted?"""

    refusals: tuple[str, ...]
    """Why not, a sentence each; empty: it may."""
    notes: tuple[str, ...]
    """What the policy let pass."""
    measured: Mapping[str, str]
    """What is kept with the promotion: site -> both scores."""


def fleet(folder: FederationFolder, task: str) -> Fleet:
    """Who could measure a module of the task now."""
    up: list[str] = []
    away: list[str] = []
    with Registry(folder) as registry:
        for row in registry.sites():
            told = row.report.task if row.report else ""
            if row.state != "member" or told not in ("", task):
                continue
            silent = time.time() - row.last_seen if row.last_seen else SLEEPS_AFTER_S + 1
            (up if told == task and silent <= SLEEPS_AFTER_S else away).append(row.name)
    return Fleet(tuple(up), tuple(away))


def run_settings(folder: FederationFolder, module: Path, task: str, sites: Sequence[str]) -> Flat:
    """The settings of a run that tests the module in a folder at these sites and trains nothing.

    Of the federation's [run] table what decides how samples are read and how tensors travel; all else is the module's.
    Raises BackboneError where the module does not fit the federation's backbone, ConfigError for one that no run can have.
    """
    spec, _ = load_exported(module)
    inputs = load_inputs(module)
    if spec.max_rank > _MAX_RANK:
        raise ConfigError(
            f"the module has rank {spec.max_rank}, a run has at most {_MAX_RANK}: it cannot be measured at the sites; promote it "
            f"with --unmeasured"
        )
    names = ",".join(sites)
    found: Flat = {
        key: value
        for key, value in folder.settings.run.items()
        if key in _KEPT_KEYS or FIELDS[key].section in _KEPT_SECTIONS
    }
    if "method" in folder.settings.run:
        found.pop("cut", None)  # that method's, which trains
    found |= {
        "task": task,
        "target": "class" if spec.numbers is None else "number",
        "module": spec.kind,
        "module-blocks": spec.last_blocks if spec.kind in ("lora", "adapter", "full") else 0,
        "lora-rank": spec.max_rank,
        "lora-alpha": spec.alpha,
        "lora-targets": ",".join(spec.targets),
        "prompt-tokens": spec.prompt_tokens,
        "prompt-depth": "all" if spec.deep_prompt and spec.kind == "prompt" else "first",
        "adapter-width": spec.adapter_width,
        "image-size": inputs.image_size,
        "max-length": inputs.max_length,
        "rounds": 0,
        "classifier-init": "zero",
        "start-module": str(module),
        "registry": "none",
        "min-sites": 1,
    }
    # A name with a comma cannot stand in the list.
    if names.count(",") == len(sites) - 1:
        found["roster"] = names
    else:
        found["sites"] = len(sites)
    RunConfig.from_flat(found)
    return found


def check_backbone(folder: FederationFolder, name: str, sha256: str) -> None:
    """Raise BackboneError where a version is of another backbone than the federation's."""
    from fedsplit.model.backbone import Backbone

    own = Backbone.find(folder.settings.backbone.path)
    if own.sha256 != sha256:
        raise BackboneError(
            f"{name} was trained on a backbone with digest {sha256[:12]}, this federation's is {own.name!r} with "
            f"{own.sha256[:12]} ({own.differs(sha256)}); its sites cannot use it"
        )


def judge(
    policy: PromotionSection,
    candidate: Measured,
    production: Measured | None,
    *,
    away: Iterable[str] = (),
) -> Verdict:
    """Compare a version with what is in production, site by site. `production` None: nothing is in use as yet."""
    refusals, notes, kept = [], [], {}
    missing = dict.fromkeys(away, "it does not report") | dict(candidate.missing)
    if production is not None:
        missing = dict(production.missing) | missing
    for site, why in sorted(missing.items()):
        told = f"site {printable(site)} is away ({why})"
        if policy.when_away == "refuse":
            refusals.append(
                f'{told}; start it, or set when-away = "accept" in [promotion] of federation.toml'
            )
        else:
            notes.append(f'{told}: it was not asked (when-away = "accept")')
    for site, (score, samples) in sorted(candidate.sites.items()):
        if site in missing:
            continue
        before = production.sites.get(site) if production else None
        kept[site] = f"{candidate.name} {_shown(score)}" + (
            f", {production.name} {_shown(before[0])}" if production and before else ""
        ) + f", {candidate.score}, {samples} test samples"  # fmt: skip
        if samples < policy.min_samples:
            told = f"site {printable(site)} has too few test samples: {samples}, at least {policy.min_samples} are wanted"
            if policy.when_few == "refuse":
                refusals.append(f"{told} (min-samples in [promotion] of federation.toml)")
                continue
            notes.append(f'{told}; it counts all the same (when-few = "accept")')
        lost = 100 * (before[0] - score) if before else 0.0
        if production is not None and lost > policy.max_loss_points + _TINY:
            refusals.append(
                f"site {printable(site)} loses {lost:.1f} points: {candidate.score} {_shown(score)} with {candidate.name}, "
                f"{_shown(before[0] if before else None)} with {production.name} in production, on its {samples} test samples; "
                f"at most {policy.max_loss_points:g} may be lost"
            )
    if not candidate.sites and not refusals:
        refusals.append("no site has measured it")
    return Verdict(tuple(refusals), tuple(notes), kept)


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"
