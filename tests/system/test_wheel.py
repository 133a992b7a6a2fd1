"""The built wheel, without a checkout: installed into a fresh environment, it runs from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fedsplit.core.programs import flower_environment
from fedsplit.plant.own_wheel import own_wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_app_and_nothing_else_at_its_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedsplit"}
    app = "fedsplit/assets/app/"
    assert {n.removeprefix(app) for n in names if n.startswith(app)} == {
        "pyproject.toml",
        "server_app/__init__.py",
        "server_app/app.py",
        "client_app/__init__.py",
        "client_app/app.py",
    }


def test_a_first_round_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """The environment is new and has the wheel alone; the libraries are those of the environment that tests."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # Only its folder: what a .pth file in there adds (this checkout) is not followed.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for program in ("flwr", "flower-superlink", "flower-superexec", "flwr-simulation", "flwr-serverapp"):  # fmt: skip
        _copy_script(Path(sys.executable).parent / program, home / "bin" / program, python)
    empty = tmp_path / "empty"
    empty.mkdir()
    env = flower_environment(tmp_path / "flower") | {"OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(home / "bin"), "/usr/bin", "/bin"])
    env.pop("PYTHONPATH", None)
    command = [str(home / "bin" / "fedsplit"), "run", "--json"]
    for setting in ("rounds=1", "sites=2", "max-samples=80", "partition=iid"):
        command += ["--set", setting]
    done = subprocess.run(
        command, cwd=empty, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["outcome"], told["rounds_done"]) == ("complete", 1)
    assert Path(told["run_dir"]).parent == empty / "runs"
    where = subprocess.run(
        [str(python), "-c", "import fedsplit; print(fedsplit.__file__)"],
        cwd=empty, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(home)


def _copy_script(source: Path, target: Path, python: Path) -> None:
    """A console script that runs under `python`."""
    lines = source.read_text().splitlines(keepends=True)
    target.write_text("".join([f"#!{python}\n", *lines[1:]]))
    target.chmod(0o755)
