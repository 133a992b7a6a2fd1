"""From settings to a request: defaults, overrides, resumed runs, TOML."""

from __future__ import annotations

import io
import json
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.cli.request import SIMULATED_SITES, prepare, to_toml
from fedsplit.core.config import RESUME_KEYS, RunConfig
from fedsplit.core.errors import ConfigError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_simulation_fills_in_sites_name_and_absolute_folder(echo_app: Path, tmp_path: Path) -> None:
    request = prepare({"rounds": 3}, app=echo_app)
    assert request.config.server.sites == SIMULATED_SITES
    assert request.run_dir.parent == tmp_path / "runs"
    assert request.config.run.run_name.startswith("digits-")
    assert set(request.overrides) == {"rounds", "sites", "runs-dir", "run-name"}


def test_own_superlink_keeps_folder_and_sites(echo_app: Path) -> None:
    request = prepare({}, app=echo_app, superlink="prod")
    assert set(request.overrides) == {"run-name"}
    assert request.config.server.sites == 0


def test_app_settings_are_the_base(echo_app: Path) -> None:
    file = echo_app / "pyproject.toml"
    file.write_text(file.read_text().replace('\nrounds = "default"', "\nrounds = 7"))
    assert prepare({}, app=echo_app).config.train.rounds == 7


def test_key_that_the_app_does_not_declare(echo_app: Path) -> None:
    file = echo_app / "pyproject.toml"
    file.write_text(file.read_text().replace('lora-rank = "default"\n', ""))
    with pytest.raises(ConfigError, match="does not declare lora-rank"):
        prepare({"lora-rank": 4}, app=echo_app)


def test_existing_run_is_not_overwritten(echo_app: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume mine"):
        prepare({"run-name": "mine"}, app=echo_app)


def write_earlier_run(tmp_path: Path) -> None:
    """A run named `mine` with 9 rounds."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    config = RunConfig.from_flat(
        {"rounds": 9, "sites": 3, "run-name": "mine", "runs-dir": str(tmp_path / "runs")}
    )
    (folder / "config.json").write_text(json.dumps({"config": config.flat(), "versions": {}}))


def test_resumed_run_keeps_its_settings(echo_app: Path, tmp_path: Path) -> None:
    write_earlier_run(tmp_path)
    request = prepare({"deadline-s": 5.0}, app=echo_app, resume="mine")
    assert (
        request.config.train.rounds,
        request.config.server.sites,
        request.config.server.deadline_s,
    ) == (9, 3, 5.0)
    assert request.config.run.resume == request.config.run.run_name == "mine"
    assert request.run_dir == tmp_path / "runs" / "mine"
    # The server has the rest from the run's folder.
    assert request.overrides.keys() == {"resume", "run-name", *RESUME_KEYS}


def test_resumed_run_elsewhere_takes_what_it_takes_anew(echo_app: Path) -> None:
    request = prepare({"deadline-s": 5.0}, app=echo_app, superlink="plant", resume="mine")
    assert request.overrides == {"resume": "mine", "run-name": "mine", "deadline-s": 5.0}
    with pytest.raises(ConfigError, match="rounds cannot be set anew"):
        prepare({"rounds": 9}, app=echo_app, superlink="plant", resume="mine")


def test_resumed_run_refuses_other_settings(echo_app: Path, tmp_path: Path) -> None:
    write_earlier_run(tmp_path)
    with pytest.raises(ConfigError, match="lora-rank cannot be set anew"):
        prepare({"lora-rank": 2}, app=echo_app, resume="mine")


def test_resume_names_the_runs_there_are(echo_app: Path, tmp_path: Path) -> None:
    write_earlier_run(tmp_path)
    with pytest.raises(ConfigError, match="runs there: mine"):
        prepare({}, app=echo_app, resume="other")


@given(
    st.dictionaries(
        st.sampled_from(RunConfig.keys()),
        st.text(st.characters(exclude_categories=["Cs"]))
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_toml_reads_back_what_was_written(flat: dict[str, str | int | float | bool]) -> None:
    assert tomllib.loads(to_toml(flat)) == flat


def test_a_recipe_is_told_and_what_was_given_goes_along(echo_app: Path) -> None:
    request = prepare({"recipe": "shared", "rounds": 5, "sites": 4}, app=echo_app)
    assert "lora-learning-rate=0.006 (0.0015 a step, for 4 sites)" in request.told
    assert request.told[-1].startswith("rounds=5, as given; the recipe has 4 to 16")
    # 5 is the default, and Flower is told that it was given all the same.
    assert request.overrides["rounds"] == 5
    assert "cut" not in request.overrides
    assert prepare({"rounds": 5}, app=echo_app).told == ()


def test_on_another_machine_the_server_has_the_last_word(echo_app: Path) -> None:
    request = prepare(
        {"recipe": "shared", "backbone": "/nowhere/vit"}, app=echo_app, superlink="prod"
    )
    assert request.told == ("the server adapts it to backbone=/nowhere/vit and logs what it chose",)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern")
def test_a_gitignore_takes_nothing_out_of_the_bundle(echo_app: Path, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    (echo_app / ".gitignore").write_text("echo_app/\n*.py\n")
    (echo_app / "echo_app" / "data").mkdir()
    (echo_app / "echo_app" / "data" / "__init__.py").touch()
    app = prepare({}, app=echo_app).app
    staged = app.stage(tmp_path / "staged")
    fab = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(staged)))
    assert {"echo_app/server.py", "echo_app/client.py", "echo_app/data/__init__.py"} <= set(
        fab.namelist()
    )
    with pytest.raises(ConfigError, match=r"echo_app.server as a component.* add it there"):
        replace(app, include=("other/*.py",)).stage(tmp_path / "again")
    assert replace(app, include=()).stage(tmp_path / "no") == echo_app
