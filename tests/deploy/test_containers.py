"""Dockerfiles, the compose file and the entry scripts: linted, and the scripts run here as in a container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
ENTRIES = sorted(DEPLOY.glob("*-entry.sh"))
SECRET = re.compile(r"(?i)secret|password|token|join.?code|private|credential|-key")


def linted(program: str, *args: str | Path) -> None:
    found = shutil.which(program, path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip(f"{program} is not installed: its wheel is for Linux")
    done = subprocess.run([found, *map(str, args)], capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing_in_a_dockerfile(dockerfile: Path) -> None:
    linted("hadolint", "--failure-threshold", "style", dockerfile)


@pytest.mark.parametrize("script", [*ENTRIES, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck_finds_nothing_in_a_script(script: Path) -> None:
    linted("shellcheck", script)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_has_no_secret_and_no_root(dockerfile: Path) -> None:
    """What an image is built from is listed in .dockerignore; what runs in it has a number of its own."""
    text = dockerfile.read_text(encoding="utf-8")
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in code if SECRET.search(line)]
    assert [line for line in code if line.startswith("USER ")] == ["USER 10001:10001"]
    copied = [w for line in code if line.startswith("COPY ") for w in line.split()[1:-1]]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in copied:
        if not path.startswith("--"):
            assert f"!{path}" in allowed, f"{path} is not among what is sent to the builder"
            assert (ROOT / path).exists()
    assert "*" in allowed


def compose() -> dict[str, Any]:
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_the_compose_file_holds_together() -> None:
    told = compose()
    assert set(told["services"]) == {"server", "site"}
    for name, service in told["services"].items():
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["profiles"] == [name]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
        # The supervisor ends its children within 10 s.
        assert int(service["stop_grace_period"].removesuffix("s")) > 10
        for volume in service["volumes"]:
            named = volume.split(":")[0] if isinstance(volume, str) else None
            assert named is None or named in told["volumes"]
        assert set(service.get("secrets", [])) <= set(told["secrets"])
        for value in service["environment"].values():
            assert not SECRET.search(value)


class Fake:
    """A `fedsplit` that notes what it is told, and makes the folder that it is told to make."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        script = folder / "bin" / "fedsplit"
        script.parent.mkdir()
        script.write_text(
            f'#!/bin/sh\necho "$*${{FEDSPLIT_CODE:+ (code known)}}" >> {self.calls}\n'
            'case "$1 $2" in\n'
            '"server init") mkdir -p "$3"; : > "$3/federation.toml" ;;\n'
            f'"site join") cat > {folder}/code-given; mkdir -p "$5"; : > "$5/site.toml" ;;\n'
            "esac\n"
        )
        script.chmod(0o755)

    def run(self, entry: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.unlink(missing_ok=True)
        return subprocess.run(
            ["sh", str(DEPLOY / entry), *args],
            cwd=self.folder,
            env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **env},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def told(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_a_server_is_made_once_and_then_runs(fake: Fake) -> None:
    missing = fake.run("server-entry.sh")
    assert (missing.returncode, fake.told()) == (2, [])
    assert "FEDSPLIT_HOST is not set: give the name or address" in missing.stderr
    assert fake.run("server-entry.sh", FEDSPLIT_HOST="plant.example").returncode == 0
    assert fake.told() == [
        "server init federation --host plant.example --port 8443", "server up federation",
    ]  # fmt: skip
    fake.run("server-entry.sh", FEDSPLIT_HOST="plant.example")
    assert fake.told() == ["server up federation"]
    for words, told in (
        (["doctor"], "doctor federation"),
        (["federation", "add-site", "line-a", "--json"], "federation add-site --federation federation line-a --json"),
        (["run", "--set", "rounds=3"], "run --federation federation --set rounds=3"),
        (["status", "--json"], "status --federation federation --json"),
        (["--version"], "--version"),
    ):  # fmt: skip
        fake.run("server-entry.sh", *words)
        assert fake.told() == [told]


def test_a_site_joins_once_and_then_runs_without_its_code(fake: Fake) -> None:
    given = {"FEDSPLIT_DATA": "folder:/data", "FEDSPLIT_TASK": "inspection"}
    missing = fake.run("site-entry.sh", **given)
    assert (missing.returncode, fake.told()) == (2, [])
    assert "a join code (FEDSPLIT_CODE_FILE) is not given" in missing.stderr
    missing = fake.run("site-entry.sh", FEDSPLIT_CODE="abc", FEDSPLIT_DATA="folder:/data")
    assert "the task (FEDSPLIT_TASK) is not given" in missing.stderr
    assert fake.run("site-entry.sh", FEDSPLIT_CODE="abc", **given).returncode == 0
    joined = "site join - --dir site --data folder:/data --task inspection"
    assert fake.told() == [f"{joined} (code known)", "site run site"]
    assert (fake.folder / "code-given").read_text() == "abc\n"
    shutil.rmtree(fake.folder / "site")
    (fake.folder / "code").write_text("abc\n")
    fake.run("site-entry.sh", FEDSPLIT_CODE_FILE="code", **given)
    assert fake.told() == [joined, "site run site"]
    fake.run("site-entry.sh")
    assert fake.told() == ["site run site"]
    fake.run("site-entry.sh", "doctor", "--json")
    assert fake.told() == ["doctor site --json"]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda p: p.name)
def test_a_first_step_that_fails_ends_the_entry(entry: Path, fake: Fake) -> None:
    script = fake.folder / "bin" / "fedsplit"
    script.write_text(f'#!/bin/sh\necho "$*" >> {fake.calls}\nexit 7\n')
    given = {"FEDSPLIT_HOST": "h", "FEDSPLIT_CODE": "c", "FEDSPLIT_DATA": "d", "FEDSPLIT_TASK": "t"}
    assert fake.run(entry.name, **given).returncode == 7
    assert len(fake.told()) == 1
