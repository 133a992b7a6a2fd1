"""Fixtures of the CLI tests: the command as a program, and a Flower app that trains nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.core.config import NOT_GIVEN, RunConfig

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fedsplit.cli.main"]
PYPROJECT = """[project]
name = "echo"
version = "0.1.0"
description = "Writes a run's files."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsplit"
fab-include = ["echo_app/**/*.py"]

[tool.flwr.app.components]
serverapp = "echo_app.server:app"
clientapp = "echo_app.client:app"

[tool.flwr.app.config]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The commands' environment: this tree first on the path, nothing written to the home directory."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "FLWR_HOME": str(tmp_path / "flower-home"),
        "COLUMNS": "120",
    }


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path, environment: dict[str, str]) -> Cli:
    """Run `fedsplit ARGS` in an empty folder."""

    def call(*args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    return call


@pytest.fixture
def echo_app(tmp_path: Path) -> Path:
    """A copy of the echo app with all of fedsplit's settings."""
    app = tmp_path / "echo"
    shutil.copytree(Path(__file__).parent / "echo_app", app)
    config = "".join(f"{key} = {json.dumps(NOT_GIVEN)}\n" for key in RunConfig.defaults())
    (app / "pyproject.toml").write_text(PYPROJECT + config, encoding="utf-8")
    return app
