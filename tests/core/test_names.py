"""Names of runs and tasks in any script: what may be one, and that it fits a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.names import MAX_RUN_CHARS, is_name, normalised


@pytest.mark.parametrize(
    "name", ["検査", "がぎぐ", "Prüfung-2", "दिन", "ひび割れ_A.1", "0", "-", "_a"]
)
def test_a_name_in_any_script_is_a_name(name: str, tmp_path: Path) -> None:
    config = RunConfig.from_flat({"task": name, "run-name": name})
    assert config.task.name == config.run.run_name == normalised(name)
    (tmp_path / config.task.name).mkdir()
    assert RunConfig.resolved(config.flat()) == config


def test_one_word_typed_on_two_systems_is_one_name() -> None:
    assert RunConfig.of(task="か\u3099").task == RunConfig.of(task="が").task


@pytest.mark.parametrize(
    "name",
    [".a", "../x", "a/b", "a\\b", "a b", "a\0", "a:b", "\u3099", "検査!", "𠮟" * 64, "x" * 101],
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="letters or digits of any script"):
        RunConfig.from_flat({"run-name": name})


def test_a_task_needs_a_name_and_a_run_does_not() -> None:
    assert RunConfig.of(run_name="").run.run_name == ""
    with pytest.raises(ConfigError, match="task=''"):
        RunConfig.from_flat({"task": ""})


@given(st.text())
def test_a_name_is_the_name_of_one_folder(name: str) -> None:
    name = normalised(name)
    if is_name(name, MAX_RUN_CHARS):
        assert Path(name).name == name
        assert len(name.encode()) <= 240
        assert name not in {".", ".."}
