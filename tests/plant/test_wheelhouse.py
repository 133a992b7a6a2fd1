"""The wheels for another machine: found by real uv and fetched by real pip, from a folder of small wheels made here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsplit.cli.main import call
from fedsplit.core.errors import ConfigError, WheelhouseError
from fedsplit.plant import wheelhouse
from fedsplit.plant.own_wheel import _packed
from fedsplit.plant.wheelhouse import COMMAND, REQUIREMENTS, WHEELS, gather, needed

ROOT = Path(__file__).parents[2]
ARM = "manylinux_2_17_aarch64"
INTEL = "manylinux_2_17_x86_64"


def make_wheel(folder: Path, name: str, *, needs: tuple[str, ...] = (), tag: str = "any", version: str = "1.0") -> Path:  # fmt: skip
    """A wheel with one empty module."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = "py3-none" if tag == "any" else "cp311-cp311"
    path = folder / f"{name}-{version}-{kind}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {kind}-{tag}\n")  # fmt: skip
        wheel.writestr(f"{info}/RECORD", f"{name}/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")  # fmt: skip
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that is a folder: `alpha` wants `beta`, which is compiled. fedsplit's own wheel wants `alpha`."""
    found = tmp_path / "index"
    make_wheel(found, "alpha", needs=("beta>=1", "gamma; platform_machine == 'x86_64'"))
    make_wheel(found, "plots", needs=())
    for tag in (ARM, INTEL):
        make_wheel(found, "beta", tag=tag)

    def own(folder: Path) -> Path:
        needs = ("alpha", 'plots; extra == "server"')
        return make_wheel(folder, "fedsplit", needs=needs, version=importlib.metadata.version("fedsplit"))  # fmt: skip

    monkeypatch.setattr(wheelhouse, "own_wheel", own)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (folder / WHEELS).iterdir())


def test_a_machine_of_another_kind_gets_its_wheels_and_can_install_from_them(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    house = tmp_path / "house"
    assert call(["wheelhouse", str(house), "--platform", "linux-aarch64", "--python", "3.11", "--json"]) == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    # Not gamma: the machine that gathers would want it, the machine that installs does not.
    assert names(house) == ["alpha", "beta", "fedsplit"]
    assert [name for name in told["wheels"] if "aarch64" in name] == [f"beta-1.0-cp311-cp311-{ARM}.whl"]  # fmt: skip
    lines = (house / REQUIREMENTS).read_text().splitlines()
    for line, (name, size) in zip(lines, sorted(told["wheels"].items()), strict=True):
        content = (house / WHEELS / name).read_bytes()
        assert line.endswith(f"--hash=sha256:{hashlib.sha256(content).hexdigest()}")
        assert size == len(content)
    assert told["command"] in (house / COMMAND).read_text()


def test_the_command_installs_here(index: Path, tmp_path: Path) -> None:
    """Gathered for a machine as this one, with an extra, and once more over what is there."""
    make_wheel(index, "gamma")
    house = tmp_path / "house"
    gather(house, platform="linux-x86_64", python="3.11")
    (house / WHEELS / "old-1.0-py3-none-any.whl").touch()
    found = gather(house, platform="linux-x86_64", python="3.11", extras=("server",))
    assert names(house) == ["alpha", "beta", "fedsplit", "gamma", "plots"]
    assert "fedsplit[server]==" in (house / REQUIREMENTS).read_text()
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        pytest.skip("these wheels are of Python 3.11 on Linux")
    venv.create(tmp_path / "venv", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv" / "bin" / "python")]
    done = subprocess.run([*pip, *found.command.split()[1:]], cwd=house, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_dependency_without_a_wheel_is_named(index: Path, tmp_path: Path) -> None:
    (index / f"beta-1.0-cp311-cp311-{ARM}.whl").unlink()
    with pytest.raises(WheelhouseError, match=r"a dependency has no wheel for it: (?s:.*)beta"):
        gather(tmp_path / "house", platform="linux-aarch64", python="3.11")
    assert not (tmp_path / "house").exists()


def test_without_a_network(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(WheelhouseError, match="index was not reached: see to the network"):
        gather(tmp_path / "house", platform="linux-aarch64", python="3.11")


def test_what_cannot_be_meant(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--platform 'pi' is not known; use one of linux-x86_64"):
        gather(tmp_path / "house", platform="pi", python="3.11")
    with pytest.raises(ConfigError, match=r"--python 'three' is no version"):
        gather(tmp_path / "house", platform="linux-aarch64", python="three")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(ConfigError, match=r"letters is there and is no wheelhouse"):
        gather(tmp_path / "letters", platform="linux-aarch64", python="3.11")
    assert call(["wheelhouse", str(tmp_path / "h"), "--platform", "linux-aarch64", "--extra", "gpu"]) == 2  # fmt: skip


def test_an_installed_fedsplit_is_packed_again(tmp_path: Path) -> None:
    """As RECORD lists it, without what the installer added."""
    made = make_wheel(tmp_path / "made", "fedsplit", needs=("alpha",))
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, str(made)], check=True, timeout=60)
    info = next(target.glob("*.dist-info"))
    packed = _packed(importlib.metadata.Distribution.at(info), tmp_path)
    assert set(zipfile.ZipFile(packed).namelist()) == set(zipfile.ZipFile(made).namelist())
    assert needed(packed) == ["alpha"]
    subprocess.run([*pip, "--upgrade", str(packed)], check=True, timeout=60)


@pytest.mark.slow
def test_all_that_a_site_needs_has_an_aarch64_wheel(tmp_path: Path) -> None:
    """By the package index that pip uses here, in the versions that are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = project["dependencies"]
    try:
        found = wheelhouse._resolved(tmp_path, needs, "linux-aarch64", "3.11", ())
    except WheelhouseError as err:
        if "not reached" in str(err):
            pytest.skip("no package index is reached from here")
        raise
    pinned = set(re.findall(r"^([a-z0-9-]+)==", found.read_text(), re.MULTILINE))
    assert {canonicalize_name(Requirement(need).name) for need in needs} <= pinned
