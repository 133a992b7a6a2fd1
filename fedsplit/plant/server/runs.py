"""Runs of a federation: the settings that its folder gives to each, and whether one can be started now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from fedsplit.core.errors import ConfigError, FederationError, RunDirError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.records import Summary
from fedsplit.plant.lock import up_pid
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.report.read import read_summary

CONNECTION = "fedsplit"
"""Of the folder's own Flower configuration."""
Flat = dict[str, str | int | float | bool]
_MAY_GO_ON_S = 86_400.0
_OF_THE_FOLDER = ("runs-dir", "registry", "encoder-address", "encoder-secret-file", "encoder-bind")


class ServiceState(BaseModel):
    """What state.json says of one service."""

    model_config = ConfigDict(frozen=True)

    state: str = "down"
    port: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class Present:
    """A server that is up."""

    services: dict[str, ServiceState]

    def port(self, service: str) -> int:
        """The loopback port of a service. Raises FederationError where it has none now."""
        if port := self.services.get(service, ServiceState()).port:
            return port
        raise FederationError(
            f"the server's {service} is not up; `fedsplit doctor` says why, and logs/{service}.jsonl has its own words"
        )


_Services = TypeAdapter(dict[str, ServiceState])


def present(folder: FederationFolder) -> Present:
    """The server that is up in a folder. Raises FederationError where none is, ServiceError where nobody may know."""
    start = f"start it with `fedsplit server up {folder.path}`"
    if up_pid(folder.state) is None:
        raise FederationError(f"the server of {folder.path} is not up; {start}")
    try:
        found = read_json(folder.state, limit=1 << 20)
        return Present(_Services.validate_python(found["services"]))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise FederationError(
            f"{folder.state} cannot be read ({printable(err, limit=100)}); stop the server and {start}"
        ) from err


def settings_of(
    folder: FederationFolder, given: Flat, *, resumed: bool = False, measuring: bool = False
) -> Flat:
    """All that a run here is started with: the folder's own, its [run] table, then what was given.

    A run that is resumed has its settings, and takes only its places anew. One that measures a module for a promotion has all
    of its own (promotion.py), and keeps no version.

    Raises ConfigError for a setting that is the folder's affair, FederationError where the server is not up.
    """
    if mine := [key for key in _OF_THE_FOLDER if key in given and not measuring]:
        raise ConfigError(
            f"{', '.join(mine)}: the federation folder {folder.path} decides that; leave it out, or start the run with "
            f"--superlink"
        )
    encoder = f"127.0.0.1:{present(folder).port('encoder')}"
    places: Flat = {
        "runs-dir": str(folder.runs),
        "registry": str(folder.modules),
        "encoder-address": encoder,
        "encoder-secret-file": str(folder.encoder_secret),
    }
    if resumed:
        return places | given
    if measuring:
        return places | {"backbone": folder.settings.backbone.path} | given
    return places | {"backbone": folder.settings.backbone.path} | folder.settings.run | given


def last_module(folder: FederationFolder, task: str) -> Path | None:
    """The module of the newest run of a task that trained one; None where there is none."""
    ended = [s for s in map(_summary, folder.runs.glob("*/summary.json")) if s is not None]
    of_task = [(path, s) for path, s in ended if s.task == task and s.outcome != "failed"]
    kept = [
        path / s.module for path, s in of_task if (path / s.module).is_dir() and not _measures(path)
    ]
    return max(kept, key=lambda p: (p.parent / "summary.json").stat().st_mtime_ns, default=None)


def old_runs(folder: FederationFolder, *, now: float) -> list[Path]:
    """Run folders beyond those that are kept, oldest first. `now`: seconds since the epoch.

    Never one that goes on, or may (it has been written in the last day), nor the last module of a task.
    """
    stamped = sorted((_written(path), path) for path in folder.runs.iterdir() if path.is_dir())
    beyond = stamped[: -folder.settings.retention.runs]
    tasks = {s[1].task for s in map(_summary, folder.runs.glob("*/summary.json")) if s is not None}
    last = {m.parent for m in (last_module(folder, task) for task in tasks) if m is not None}
    return [path for at, path in beyond if at < now - _MAY_GO_ON_S and path not in last]


def _measures(run_dir: Path) -> bool:
    """Did a run only measure a module, for a promotion?"""
    try:
        config = read_json(run_dir / "config.json")["config"]
        return bool(config["rounds"] == 0 and config["start-module"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _written(run_dir: Path) -> float:
    """When a run's own files were last written."""
    return max((p.stat().st_mtime for p in run_dir.iterdir() if p.is_file()), default=0.0)


def _summary(path: Path) -> tuple[Path, Summary] | None:
    try:
        return path.parent, read_summary(path.parent)
    except RunDirError:
        return None
