"""`fedsplit config show`: what is resolved, and who gave it; and the run file of `fedsplit run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.cli import main
from fedsplit.core.config import RunConfig


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text('[run]\nrecipe = "shared"\n\n[train]\nbatch-size = 4\nrounds = 5\n')
    return path


def shown(capsys: pytest.CaptureFixture[str], app: Path, *args: str) -> dict[str, Any]:
    assert main.call(["config", "show", *args, "--app", str(app), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert isinstance(record, dict)
    return record


def test_where_each_value_comes_from(
    echo_app: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = echo_app / "pyproject.toml"
    toml.write_text(toml.read_text().replace('\nseed = "default"', "\nseed = 3"))
    record = shown(capsys, echo_app, str(job), "--set", "rounds=6", "--set", "sites=4")
    settings = record["settings"]
    assert list(settings) == list(RunConfig.keys())
    found = {key: (settings[key]["value"], settings[key]["from"]) for key in settings}
    assert found["seed"] == (3, "pyproject")
    assert found["batch-size"] == (4, "file")
    assert found["rounds"] == (6, "--set")  # over the file's
    assert found["classifier-init"] == ("ridge", "recipe")
    assert found["cut"] == ("0,6", "recipe")
    assert found["lora-learning-rate"] == (0.006, "recipe")
    assert found["learning-rate"] == (0.01, "automatic")
    assert found["lora-rank"] == (8, "default")
    assert settings["cut"]["table"] == "placement"
    assert record["file"] == str(job)


def test_a_method_of_whole_devices_shows_their_cut(
    echo_app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = shown(capsys, echo_app, "--set", "method=fedavg-full", "--changed")["settings"]
    assert settings["cut"] == {"table": "placement", "value": "6,6", "from": "method"}
    assert settings["module"]["from"] == "method"
    assert "lora-rank" not in settings


def test_a_person_gets_a_table(
    echo_app: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.call(["config", "show", str(job), "--app", str(echo_app)]) == 0
    captured = capsys.readouterr()
    assert "[train]" in captured.out
    assert len(captured.out.splitlines()) == len(RunConfig.keys()) + 1
    assert "lora-learning-rate: 0.0015 for each site" in captured.err


def test_run_reads_the_file_and_tells_its_faults(
    echo_app: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write_text('[run]\nmethod = "closed-form"\n[train]\nrounds = 5\n')
    assert main.call(["run", str(job), "--app", str(echo_app)]) == 2
    said = capsys.readouterr().err
    assert "rounds=5: method=closed-form means rounds=0; leave rounds out, or choose" in said
    assert main.call(["run", "rounds=3"]) == 2
    assert "settings go behind --set, e.g. fedsplit run --set rounds=3" in capsys.readouterr().err
