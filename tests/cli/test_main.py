"""The command as a program: quick help, one-screen errors, one JSON object, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Cli


def test_help_loads_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys; from fedsplit.cli.main import call; call(['--help']); call(['run', '--help']);"
        "heavy = {'torch', 'flwr', 'matplotlib', 'ray', 'grpc', 'transformers'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("demo", "run", "encoder"):
        assert command in done.stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("fedsplit ")


def test_unknown_key_is_explained_and_nothing_starts(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--app", str(ROOT), "--set", "ronds=3", "--set", "lora-rnk=2")
    assert done.returncode == 2
    assert "did you mean 'rounds'?" in done.stderr
    assert "lora-rank" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_cut(cli: Cli) -> None:
    done = cli("run", "--set", "cut=5,2")
    assert done.returncode == 2
    assert "0 <= a <= b" in done.stderr


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_bad_app_folder(cli: Cli, folder: str) -> None:
    done = cli("run", "--app", folder)
    assert done.returncode == 2
    assert "is not a Flower app" in done.stderr


@pytest.mark.parametrize(
    ("args", "kind", "part"),
    [
        (["run", "--set", "rounds=-1"], "ConfigError", "rounds"),
        (["run", "--set", "rounds"], "ConfigError", "KEY=VALUE"),
        (["run", "--resume", "never-was"], "ConfigError", "no run 'never-was'"),
        (["run", "--nonsense"], "UsageError", "--nonsense"),
        (
            ["encoder", "serve", "--backbone", "x", "--secret-file", "none"],
            "ConfigError",
            "--new-secret",
        ),
        (
            ["encoder", "serve", "--backbone", "x", "--secret-file", "none", "--tls-cert", "c"],
            "ConfigError",
            "--tls-key",
        ),
    ],
)
def test_json_error_is_one_object(cli: Cli, args: list[str], kind: str, part: str) -> None:
    done = cli(*args, "--json")
    assert done.returncode == 2
    record = json.loads(done.stdout)
    assert list(record) == ["error"]
    assert record["error"]["kind"] == kind
    assert part in record["error"]["message"]


def test_unknown_superlink_connection_is_wrong_use(cli: Cli) -> None:
    done = cli("run", "--superlink", "nowhere", "--json")
    assert done.returncode == 2
    record = json.loads(done.stdout)
    assert record["error"]["kind"] == "ConfigError"
    assert "--superlink nowhere" in record["error"]["message"]
