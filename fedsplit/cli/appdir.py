"""Finds the Flower app that `fedsplit run` submits: a folder whose pyproject.toml describes one.

Reads files only.
"""

from __future__ import annotations

import shutil
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
    include: tuple[str, ...] = ()
    """Patterns of the files that its bundle is made of; empty: whatever Flower takes."""
    modules: tuple[str, ...] = ()
    """Where its apps are: `server_app.app`."""

    def stage(self, folder: Path) -> Path:
        """A copy of the bundle's files in `folder`, to be submitted in the app's place. Raises ConfigError.

        Flower leaves out of a bundle what the app's .gitignore names, so a line `data/` there ends in an import error
        at every site. The copy has no .gitignore. An app that does not say what its bundle is made of is left as it is.
        """
        if not self.include:
            return self.path
        patterns = [p.lstrip("/") if "/" in p.strip("/") else f"**/{p}" for p in self.include]
        for pattern in ("pyproject.toml", "LICENSE*", "README*", *patterns):
            for file in self.path.glob(pattern):
                if file.is_file() and not file.is_symlink():
                    copy = folder / file.relative_to(self.path)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
        for name in self.modules:
            place = folder.joinpath(*name.split("."))
            if not place.with_suffix(".py").is_file() and not (place / "__init__.py").is_file():
                raise ConfigError(
                    f"the app at {self.path} names {name} as a component, and fab-include of its pyproject.toml "
                    f"does not take that file into the bundle; add it there"
                )
        return folder


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
    return AppDir(
        path.resolve(),
        dict(app.get("config", {})),
        include=tuple(map(str, app.get("fab-include", ()))),
        modules=tuple(str(name).partition(":")[0] for name in app["components"].values()),
    )
