"""What a federation folder gives to its runs, and what is said where none can be started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.plant.lock import taken
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.runs import last_module, old_runs, present, settings_of
from tests.report.samples import metrics, summary

HELD: list[FileLock] = []
TOML = 'format = 1\n[server]\nhost = "h"\n[backbone]\npath = "/models/vit"\n[run]\ncut = "1,3"\nrounds = 7\n'


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    (tmp_path / "federation.toml").write_text(TOML, encoding="utf-8")
    (tmp_path / "run").mkdir()
    return FederationFolder.at(tmp_path)


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    yield
    while HELD:
        HELD.pop().release()


def up(folder: FederationFolder, **more: object) -> None:
    HELD.append(taken(folder.state))
    state = {"pid": os.getpid(), "services": {"encoder": {"port": 4711}, "control": {"port": 0}}}
    folder.state.write_text(json.dumps(state | more), encoding="utf-8")


def test_a_run_has_the_folders_settings_below_what_was_given(folder: FederationFolder) -> None:
    up(folder)
    settings = settings_of(folder, {"rounds": 2})
    assert settings == {
        "backbone": "/models/vit", "runs-dir": str(folder.runs), "registry": str(folder.modules), "encoder-address": "127.0.0.1:4711",
        "encoder-secret-file": str(folder.encoder_secret), "cut": "1,3", "rounds": 2,
    }  # fmt: skip


def test_a_resumed_run_takes_only_its_places_anew(folder: FederationFolder) -> None:
    up(folder)
    assert settings_of(folder, {}, resumed=True).keys() == {
        "runs-dir", "registry", "encoder-address", "encoder-secret-file",
    }  # fmt: skip


def test_what_the_folder_decides_cannot_be_given(folder: FederationFolder) -> None:
    up(folder)
    with pytest.raises(
        ConfigError, match=r"runs-dir, encoder-address: the federation folder .* decides that"
    ):
        settings_of(folder, {"runs-dir": "x", "encoder-address": "h:1"})


def test_a_server_that_is_not_up_is_told(folder: FederationFolder) -> None:
    with pytest.raises(FederationError, match="is not up; start it with `fedsplit server up"):
        present(folder)
    up(folder)
    assert present(folder).port("encoder") == 4711
    HELD.pop().release()
    # As a power cut leaves it: the number may be another program's by now.
    with pytest.raises(FederationError, match="is not up; start it with `fedsplit server up"):
        present(folder)


@pytest.mark.parametrize("services", [None, 1, {"encoder": 1}, {"encoder": {"port": "x"}}])
def test_a_state_that_cannot_be_read_is_told(folder: FederationFolder, services: object) -> None:
    up(folder, services=services)
    with pytest.raises(FederationError, match="cannot be read"):
        present(folder)


def test_a_service_that_is_down_is_named(folder: FederationFolder) -> None:
    up(folder)
    with pytest.raises(FederationError, match="the server's control is not up"):
        present(folder).port("control")


def test_the_last_module_is_the_newest_of_its_task_that_did_not_fail(
    folder: FederationFolder,
) -> None:
    assert last_module(folder, "t") is None
    ended = [
        ("one", "t", "complete", 1),
        ("two", "t", "partial", 2),
        ("three", "t", "failed", 3),
        ("four", "u", "complete", 4),
    ]
    for name, task, outcome, when in ended:
        path = folder.runs / name
        (path / "module").mkdir(parents=True)
        made = summary(metrics(), task=task, outcome=outcome)
        (path / "summary.json").write_text(made.model_dump_json(), encoding="utf-8")
        os.utime(path / "summary.json", (when, when))
    (folder.runs / "broken").mkdir()
    (folder.runs / "broken" / "summary.json").write_text("{", encoding="utf-8")
    assert last_module(folder, "t") == folder.runs / "two" / "module"
    assert last_module(folder, "v") is None
    # What goes when one run is kept: neither a task's last module, nor what may go on still.
    os.utime(folder.runs / "broken" / "summary.json", (5, 5))
    (folder.path / "federation.toml").write_text(TOML + "[retention]\nruns = 1\n", encoding="utf-8")
    assert old_runs(FederationFolder.at(folder.path), now=86_410.0) == [
        folder.runs / "one",
        folder.runs / "three",
    ]
    assert old_runs(FederationFolder.at(folder.path), now=86_402.5) == [folder.runs / "one"]
    assert old_runs(folder, now=1e12) == []
