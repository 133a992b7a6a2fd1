"""`fedsplit module promote` in a federation: measures a version at the sites before they use it; told which site loses how much.

module.py has the command. Two runs that train nothing: the version, and what is in production; then the policy decides.
"""

from __future__ import annotations

import secrets
from typing import Any, NoReturn

from fedsplit.cli.console import Output
from fedsplit.core.errors import PromotionError
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.promotion import (
    Measured,
    Verdict,
    check_backbone,
    fleet,
    judge,
    run_settings,
)
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import PRODUCTION, Version

SITES_TAKE_IT = "sites that are up use it within a minute; `fedsplit status` shows which one has it"


def decided_by(
    folder: FederationFolder,
    registry: ModuleRegistry,
    version: Version,
    *,
    alias: str,
    unmeasured: bool,
    out: Output,
) -> dict[str, str]:
    """What is kept of the measurement of a version that an alias may point to. Raises PromotionError where the policy refuses it.

    Only `production` is measured. `unmeasured`: without a measurement, which is told and stands in the audit log.
    """
    if alias != PRODUCTION:
        return {}
    check_backbone(folder, version.name, version.backbone_sha256)
    now = registry.aliases().get(version.task, {}).get(alias, "")
    if now == version.digest:
        out.note(f"{version.name} is in production already; it is not measured again")
        return {}
    if not folder.settings.promotion.require:
        out.note("it is not measured: require = false in [promotion] of federation.toml")
        return {"unmeasured": "require = false in federation.toml"}
    if unmeasured:
        out.note(f"warning: {version.name} goes into production unmeasured; the audit log says so")
        return {"unmeasured": "asked for with --unmeasured"}
    return dict(_measured(folder, registry, version, now, out).measured)


def _measured(
    folder: FederationFolder, registry: ModuleRegistry, version: Version, now: str, out: Output
) -> Verdict:
    """The verdict on a version that may be promoted. Raises PromotionError for one that may not."""
    who = fleet(folder, version.task)
    if not who.up:
        raise PromotionError(
            f"no site with data of task {version.task} is up, so {version.name} cannot be measured"
            + (f" (away: {', '.join(who.away[:20])})" if who.away else "")
            + "; start the sites, or promote it with --unmeasured"
        )
    policy = folder.settings.promotion
    if who.away and policy.when_away == "refuse":
        # Before it takes two runs to come to the same.
        _refuse(folder, version, judge(policy, Measured(version.name, "", {}), None, away=who.away))
    candidate = _tested(folder, registry, version, who.up, out)
    present = None
    if old := next((v for v in registry.versions(version.task) if v.digest == now), None):
        present = _tested(folder, registry, old, who.up, out)
    verdict = judge(policy, candidate, present, away=who.away)
    for site, told in sorted(verdict.measured.items()):
        out.note(f"  {site}: {told}")
    for note in verdict.notes:
        out.note(f"note: {note}")
    if verdict.refusals:
        _refuse(folder, version, verdict)
    return verdict


def _refuse(folder: FederationFolder, version: Version, verdict: Verdict) -> NoReturn:
    """Note it in the audit log, and raise PromotionError."""
    audit.record(
        folder, "promotion-refused", "server", module=version.name, module_sha256=version.digest,
        reasons=list(verdict.refusals), measured=[f"{s}: {t}" for s, t in verdict.measured.items()],
    )  # fmt: skip
    raise PromotionError(
        f"{version.name} is not promoted, and nothing has changed:\n"
        + "\n".join(f"  - {reason}" for reason in verdict.refusals)
        + "\nTo promote it all the same: --unmeasured"
    )


def _tested(
    folder: FederationFolder,
    registry: ModuleRegistry,
    version: Version,
    sites: tuple[str, ...],
    out: Output,
) -> Measured:
    """One version on the sites' own test samples: a run that trains nothing."""
    from fedsplit.cli.execute import execute
    from fedsplit.cli.follow import Progress
    from fedsplit.cli.request import prepare
    from fedsplit.core.records import Summary
    from fedsplit.plant.server.run_audit import audited

    out.note(f"{version.shown} is measured at {', '.join(sites)} ...")
    settings = run_settings(folder, registry.folder(version), version.task, sites)
    settings["run-name"] = f"measure-{version.number}-{secrets.token_hex(4)}"
    request = prepare(settings, federation=folder, measuring=True)
    with (
        Progress(out.stderr, untrained=False) as progress,
        audited(folder, request.config.run.run_name, request.run_dir, out.note) as note_end,
    ):
        ended: Any = execute(request, progress)
        note_end(ended)
    if not isinstance(ended, Summary) or ended.outcome == "failed":
        why = getattr(ended, "reason", "")
        raise PromotionError(f"{version.name} could not be measured: {why}; nothing has changed")
    for note in ended.notes:
        out.note(f"note: {note}")
    return Measured.of(version.name, ended)
