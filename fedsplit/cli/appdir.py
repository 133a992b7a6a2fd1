"""Finds the Flower app that `fedsplit run` submits: a folder whose pyproject.toml describes one.

Reads files only; called by `run.py` before anything is started.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedsplit
from fedsplit.core.errors import ConfigError

Flat = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class AppDir:
    """A Flower app on disk and the settings it comes with."""

    path: Path
    config: Flat


def find_app(given: Path | None) -> AppDir:
    """The app at `given`, else in the working directory, else the checkout or the wheel's. Raises ConfigError."""
    if given is not None:
        app = _read(given)
        if app is None:
            raise ConfigError(
                f"--app {given} is not a Flower app: a folder is wanted whose pyproject.toml has "
                "[tool.flwr.app.components]"
            )
        return app
    package = Path(fedsplit.__file__).resolve().parent
    # In the wheel only: a checkout has the app at its top.
    carried = package / "assets" / "app"
    for path in (Path.cwd(), package.parent, carried):
        app = _read(path, project="fedsplit")
        if app is not None:
            return app
    raise ConfigError(
        f"no Flower app of fedsplit here: neither {Path.cwd()} nor the installed package at {package} has "
        "a pyproject.toml with [tool.flwr.app]; install fedsplit again, or give a checkout with --app DIR"
    )


def _read(path: Path, project: str | None = None) -> AppDir | None:
    """The app at `path`, or None where there is none (or not one of `project`)."""
    file = path / "pyproject.toml"
    if not file.is_file():
        return None
    try:
        toml = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"{file} cannot be read as TOML: {err}") from err
    app: dict[str, Any] = toml.get("tool", {}).get("flwr", {}).get("app", {})
    if "components" not in app:
        return None
    if project is not None and toml.get("project", {}).get("name") != project:
        return None
    return AppDir(path.resolve(), dict(app.get("config", {})))
