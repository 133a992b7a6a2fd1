"""`fedsplit experiment` as a program: faults before anything runs, a whole grid, and going on after a kill."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import COMMAND, Cli

GRID = """
[experiment]
name = "small"
seeds = [0, 1]
[defaults]
backbone = "{backbone}"
max-samples = 80
image-size = 16
rounds = 1
sites = 2
cut = "1,3"
[axes]
partition = ["iid"]
[[methods]]
name = "FedV"
method = "fedv"
[[methods]]
name = "Probe"
method = "linear-probe"
tune = {{ learning-rate = [0.01, 0.1] }}
"""


@pytest.fixture
def grid(tiny: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(backbone=tiny["vit"]), encoding="utf-8")
    return path


def test_all_faults_and_no_run(cli: Cli, grid: Path, tmp_path: Path) -> None:
    text = grid.read_text().replace('method = "fedv"', 'method = "fedvv"\nlora-rnk = 3')
    grid.write_text(text.replace('"linear-probe"', '"linear-probe"\ncut = "2,9"'))
    done = cli("experiment", str(grid), "--json")
    assert done.returncode == 2
    (error,) = json.loads(done.stdout).values()
    assert error["kind"] == "ConfigError"
    for part in (
        "3 faults; no run was started",
        "did you mean 'fedv'",
        "did you mean 'lora-rank'",
        "cut 2,9",
    ):
        assert part in error["message"]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["none.toml"], "cannot be read"),
        (["grid.toml", "--only", "Nobody"], "it has FedV, Probe"),
    ],
)
def test_wrong_use(cli: Cli, grid: Path, args: list[str], part: str) -> None:
    done = cli("experiment", *args)
    assert done.returncode == 2
    assert part in done.stderr


def test_a_grid_from_dry_run_to_results_and_again(cli: Cli, grid: Path, tmp_path: Path) -> None:
    dry = cli("experiment", str(grid), "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    planned = json.loads(dry.stdout)
    assert (planned["runs"], planned["tuning_runs"], planned["done"]) == (6, 2, [])
    assert not (tmp_path / "results").exists()

    done = cli("experiment", str(grid), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["runs"], told["complete"], told["exit_code"]) == (4, 4, 0)
    out = tmp_path / "results" / "small"
    assert Path(told["out"]) == out
    assert {p.name for p in out.iterdir()} == {
        "results.csv", "table.md", "tuning.csv", "runs", "tuning", "labels.png", "labels.svg", "accuracy-bytes.png",
        "accuracy-bytes.svg", "accuracy-rounds.png", "accuracy-rounds.svg", "accuracy-final.png",
        "accuracy-final.svg",
    }  # fmt: skip
    with (out / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["seed"], r["partition"]) for r in rows] == [
        ("FedV", "0", "iid"), ("Probe", "0", "iid"), ("FedV", "1", "iid"), ("Probe", "1", "iid"),
    ]  # fmt: skip
    with (out / "tuning.csv").open(encoding="utf-8") as file:
        tuned = list(csv.DictReader(file))
    assert [t["candidate"] for t in tuned] == ["learning-rate=0.01", "learning-rate=0.1"]
    assert sorted(t["chosen"] for t in tuned) == ["False", "True"]
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "4 of 4 runs are complete" in table
    assert "the best of 2 candidates" in table
    lines = [line for line in done.stderr.splitlines() if line.startswith(("FedV ", "Probe "))]
    assert len(lines) == 4
    assert "global" in lines[0]

    again = cli("experiment", str(grid), "--only", "FedV")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(done before)") == 2
    # What is done of the others stays in the files.
    assert "| FedV |" in again.stdout
    assert "| Probe |" in again.stdout
    with (out / "results.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    with (out / "tuning.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == tuned
    assert "the best of 2 candidates" in (out / "table.md").read_text(encoding="utf-8")

    # A search that has ended says what it chose, so that its runs are known to be done.
    dry = cli("experiment", str(grid), "--dry-run", "--json")
    assert len(json.loads(dry.stdout)["done"]) == 6


@pytest.mark.slow
def test_killed_and_started_again(
    grid: Path, cli: Cli, environment: dict[str, str], tmp_path: Path
) -> None:
    """Terminated in good order, then killed: what was done stays done."""
    out = tmp_path / "results" / "small"
    grid.write_text(grid.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2, 3, 4, 5]"))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [*COMMAND, "experiment", str(grid), "--only", "FedV"], cwd=tmp_path, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        seen = 0
        end = time.monotonic() + 120
        while seen < 1 and time.monotonic() < end:
            line = process.stderr.readline()
            seen += line.startswith("FedV ") and "done before" not in line
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == code
        if number == signal.SIGTERM:
            assert "the same command goes on from there" in " ".join(rest.split())
            assert (out / "results.csv").is_file()
    finished = [p.parent.name for p in out.glob("runs/*/summary.json")]
    assert 2 <= len(finished) < 6
    done = cli("experiment", str(grid), "--only", "FedV")
    assert done.returncode == 0, done.stderr
    assert 2 <= done.stderr.count("(done before)") < 6
    assert "6 of 6 runs are complete" in done.stdout
