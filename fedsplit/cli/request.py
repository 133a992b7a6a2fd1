"""From the command line's words to a checked request for one run, before anything is started.

Settings come from `--set`, from the run that is resumed, and from what the app's pyproject.toml gives. Starts nothing.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedsplit.cli.appdir import AppDir, Flat, find_app
from fedsplit.core.config import NOT_GIVEN, RESUME_KEYS, RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.extras import check_extra
from fedsplit.core.foreign import read_json
from fedsplit.core.names import MAX_RUN_CHARS, MAX_TASK_CHARS, is_name, normalised
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.runs import CONNECTION, settings_of

_OF_RESUMING = ("resume", "run-name")
SIMULATED_SITES = 4
"""Sites that are simulated when `sites` is left at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A run that may be started."""

    app: AppDir
    config: RunConfig
    overrides: Flat
    """What differs from the app's own settings: all that Flower needs to be told. Of a resumed run what it takes anew."""
    told: tuple[str, ...] = ()
    """What the recipe chose, a line each."""
    warnings: tuple[str, ...] = ()
    """What should be known before a run that may start."""
    superlink: str | None
    """The connection of a SuperLink that is there; None: one is started for this run."""
    federation: FederationFolder | None = None
    """The federation folder whose SuperLink that is; None: the user's own."""

    @property
    def where(self) -> str:
        """The option that sends a run there, with a space behind it; empty for this machine."""
        if self.federation is not None:
            return f"--federation {self.federation.path} "
        return f"--superlink {self.superlink} " if self.superlink is not None else ""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.runs_dir).expanduser().absolute() / self.config.run.run_name


def prepare(
    settings: Flat,
    *,
    app: Path | None = None,
    superlink: str | None = None,
    federation: FederationFolder | None = None,
    resume: str | None = None,
    measuring: bool = False,
) -> RunRequest:
    """Merge and check everything that can be checked here. Raises ConfigError, and FederationError for a server that is not up.

    `measuring`: the run tests a module for a promotion; its settings are not those of the federation's runs.
    """
    found = find_app(app)
    if federation is not None:
        superlink = CONNECTION
        settings = settings_of(
            federation, settings, resumed=resume is not None, measuring=measuring
        )
    merged = given_by(found)
    saved: Flat = {}
    local = superlink is None
    if local:
        check_extra("simulation", "a simulation on this machine", "ray", "flwr_datasets")
    if resume is not None:
        runs_dir = Path(str(settings.get("runs-dir", merged.get("runs-dir", "runs")))).expanduser()
        saved = _resumed(runs_dir, resume, must_exist=local or federation is not None)
        _check_resumed(saved, settings)
        merged |= saved
        merged |= dict.fromkeys(_OF_RESUMING, resume)
    merged |= settings
    if local:
        merged["sites"] = merged.get("sites") or SIMULATED_SITES
        merged["runs-dir"] = str(Path(str(merged.get("runs-dir", "runs"))).expanduser().absolute())
    if not merged.get("run-name"):
        merged["run-name"] = _fresh_name(
            "tasks" if merged.get("tasks") else str(merged.get("task", RunConfig().task.name))
        )
    # What an earlier run was started with is settled; else what is here was given.
    config = RunConfig.resolved(merged) if saved else RunConfig.from_flat(merged)
    overrides = {k: v for k, v in merged.items() if found.config.get(k) != v}
    if resume is not None:
        # The server has the rest from the run's folder.
        overrides = {k: v for k, v in overrides.items() if k in {*_OF_RESUMING, *RESUME_KEYS}}
    _check_keys(found, overrides)
    request = RunRequest(
        app=found,
        config=config,
        overrides=overrides,
        told=_recipe_told(config),
        superlink=superlink,
        federation=federation,
    )
    if local or federation is not None:
        _check_folder(request)
        # Local runs read the same files as Flower's processes will.
        from fedsplit.cli.checks import check_here

        request = replace(request, warnings=tuple(check_here(config, data=local)))
    return request


def given_by(app: AppDir) -> Flat:
    """The settings that an app's own pyproject.toml gives: those of its keys that are not at the word "default"."""
    known = set(RunConfig.keys())
    return {k: v for k, v in app.config.items() if k in known and v != NOT_GIVEN}


def _recipe_told(config: RunConfig) -> tuple[str, ...]:
    """What the recipe chooses as far as this machine knows the backbone; the server has the last word and logs it."""
    from fedsplit.core.errors import BackboneError
    from fedsplit.model.backbone import Backbone

    if not config.run.recipe or config.run.resume:
        return ()
    try:
        backbone = Backbone.find(config.placement.backbone)
    except BackboneError:
        return (
            f"the server adapts it to backbone={config.placement.backbone} and logs what it chose",
        )
    of = {"sites": config.server.sites}
    return tuple(config.fitted(backbone.blocks, **of).recipe_told(backbone.blocks, **of))


def _check_folder(request: RunRequest) -> None:
    """Two runs never write into one folder: neither a fresh one nor one that goes on."""
    folder, name = request.run_dir, request.config.run.run_name
    if folder.is_dir() and RunDir(folder).busy:
        raise ConfigError(
            f"run {name} is being written by another process now ({folder}); wait for its end, or choose another "
            f"run-name"
        )
    if not request.config.run.resume and folder.exists():
        raise ConfigError(
            f"the run folder {folder} exists already; choose another run-name, or go on with that run: "
            f"fedsplit run {request.where}--resume {name}"
        )


def _resumed(runs_dir: Path, name: str, *, must_exist: bool) -> Flat:
    """The settings of an earlier run, so that it goes on as it began."""
    path = runs_dir / name / "config.json"
    if not path.is_file():
        if not must_exist:
            return {}
        there = sorted(p.parent.name for p in runs_dir.glob("*/config.json"))
        hint = f"runs there: {', '.join(there[-10:])}" if there else "there are none there"
        raise ConfigError(f"no run {name!r} to resume in {runs_dir.absolute()}; {hint}")
    try:
        record = read_json(path)
        flat = dict(record.get("config", record))
    except (OSError, ValueError, AttributeError, TypeError) as err:
        raise ConfigError(f"{path} cannot be read as a run's settings: {err}") from err
    return {k: v for k, v in flat.items() if k in set(RunConfig.keys()) - {"runs-dir"}}


def _check_resumed(saved: Flat, settings: Flat) -> None:
    """A resumed run is the same run: say so rather than drop a setting silently."""
    # Of a run on another machine nothing is known here, and the server takes no other key anew.
    changed = [k for k, v in settings.items() if k not in RESUME_KEYS and saved.get(k) != v]
    if changed:
        raise ConfigError(
            f"a resumed run keeps the settings it was started with; {', '.join(changed)} cannot be set anew "
            f"(these can: {', '.join(RESUME_KEYS)}); start a new run for that"
        )


def _check_keys(app: AppDir, overrides: Flat) -> None:
    """Flower fails late, with a traceback, on a key that the app does not declare."""
    missing = sorted(set(overrides) - set(app.config))
    if missing:
        raise ConfigError(
            f"the app at {app.path} does not declare {', '.join(missing)} under [tool.flwr.app.config] in "
            "its pyproject.toml, and Flower refuses such a key; add it there"
        )


def _fresh_name(task: str) -> str:
    """Task, date and four characters of chance: two runs of one second get two names."""
    stamp = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    task = normalised(task)[: MAX_RUN_CHARS - len(stamp) - 1]
    # What is wrong with the task's name is told of the task.
    return f"{task}-{stamp}" if is_name(task, MAX_TASK_CHARS) else stamp


def to_toml(flat: Flat) -> str:
    """The settings as TOML, for `flwr run --run-config FILE`."""
    lines = []
    for key, value in flat.items():
        # JSON's strings and numbers are TOML's too, but for DEL, which TOML wants escaped.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {text}\n")
    return "".join(lines)
