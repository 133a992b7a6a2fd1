"""The import contracts of pyproject.toml cover what nobody listed: planted imports break `make check`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SITE = "fedsplit/federation/site.py"
EXPERIMENT = "fedsplit/experiment/grid.py"
PLANTED = [
    (SITE, "import fedsplit.federation.server.strategy"),
    (SITE, "import fedsplit.federation.server.books.run_dir"),
    (SITE, "import fedsplit.federation.server.combine.guard"),
    (SITE, "import fedsplit.federation.engine.in_process"),
    ("fedsplit/site/round.py", "import fedsplit.transport.server"),
    ("fedsplit/site/work.py", "import fedsplit.trunk.host"),
    ("fedsplit/plant/site/folder.py", "import fedsplit.plant.server.folder"),
    ("fedsplit/plant/settings_file.py", "import fedsplit.plant.site.folder"),
    (EXPERIMENT, "import grpc"),
    (EXPERIMENT, "import flwr"),
]


def lint(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    for name in ("fedsplit", "server_app", "client_app"):
        ignore = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def test_the_contracts_hold_in_a_copy_and_each_planted_import_breaks_them(copy: Path) -> None:
    code, told = lint(copy)
    assert code == 0, told
    for path, line in PLANTED:
        with (copy / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    code, told = lint(copy)
    assert code == 1
    for path, line in PLANTED:
        importer = path.removesuffix(".py").replace("/", ".")
        assert f"{importer} -> {line.removeprefix('import ')} " in told, (
            f"{line} in {path}:\n{told}"
        )
