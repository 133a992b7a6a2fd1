"""The grid file: what it may say, and what is said of one that is wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core import toml_file
from fedsplit.core.errors import ConfigError
from fedsplit.experiment.cells import Faults, expand
from fedsplit.experiment.grid import Grid, parse_grid, read_grid

ROOT = Path(__file__).resolve().parents[2]
GOOD = b"""
[experiment]
name = "g"
[[methods]]
name = "a"
method = "fedv"
rounds = 3
tune = { learning-rate = [0.1, 0.01] }
"""


def faults_of(data: bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_grid(data, where="g.toml")
    head, *lines = str(caught.value).split("\n  - ")
    assert head.startswith("grid g.toml")
    return lines or [head]


def test_a_method_table_holds_settings_and_its_own_keys() -> None:
    grid = parse_grid(GOOD, where="g.toml")
    (method,) = grid.methods
    assert method.settings == {"method": "fedv", "rounds": 3}
    assert grid.tuned(method) == {"learning-rate": [0.1, 0.01]}
    assert grid.experiment.seeds == [0]
    assert grid.out == Path("results/g")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"[experiment", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"a=" + b"[" * 5000, "not TOML"),
        (b"a=" + b"9" * 6000, "not TOML"),
        (b"#" * (toml_file.MAX_FILE_BYTES + 1), "larger than"),
    ],
)
def test_what_is_no_toml_is_said(data: bytes, part: str) -> None:
    (fault,) = faults_of(data)
    assert part in fault
    assert len(fault) < 500


def test_every_fault_of_the_form_at_once() -> None:
    faults = faults_of(b"""
fish = 1
[experiment]
name = "no spaces please"
seeds = [0, "1", -1]
color = "red"
[axes]
partition = []
[[methods]]
method = "fedv"
[[methods]]
name = "b"
when = 2024-01-01
tune = { learning-rate = 3 }
[[methods]]
name = "bad|label"
""")
    text = "\n".join(faults)
    for part in (
        "fish: unknown key", "experiment.name: 'no spaces please' is no name", "experiment.seeds[2]='1'", "experiment.seeds[3]=-1",
        "experiment.color", "axes.partition=[]", "methods[1].name is missing",
        "methods[2].when=datetime.date(2024, 1, 1): a number, true, false or a string is wanted",
        "methods[2].tune.learning-rate", "methods[3].name='bad|label'",
    ):  # fmt: skip
        assert part in text
    assert len(faults) == 10


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (b'[[methods]]\nname = "a"\n', "'a' is used more than once"),
        (b"[tuning]\nseed = 0\n", "tuning.seed=0 is one of experiment.seeds"),
        (b"[axes]\nsites = " + repr(list(range(2, 200))).encode() + b"\nrounds = "
         + repr(list(range(1, 200))).encode() + b"\n", "at most 20000"),
        (b'[[methods]]\nname = "b"\ntune = { rounds = ' + repr(list(range(1, 200))).encode() + b", batch-size = [1, 2] }\n",
         "tunes 398 candidates"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(more: bytes, part: str) -> None:
    assert part in "\n".join(faults_of(GOOD + more))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, Path("nul\0")):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_grid(path)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_grid_or_a_config_error(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_grid(data, where="fuzz"), Grid)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
_KEYS = st.sampled_from(
    ["name", "seeds", "method", "rounds", "tune", "seed", "partition", "sites", "lora-rank", "x"]
)
_TABLES = st.dictionaries(_KEYS, _VALUES, max_size=4)


@given(
    st.fixed_dictionaries(
        {"experiment": _TABLES, "methods": st.lists(_TABLES, max_size=2)},
        optional={
            "axes": _TABLES,
            "defaults": _TABLES,
            "problems": st.lists(_TABLES, max_size=2),
            "tuning": _TABLES,
        },
    ),
    st.booleans(),
)
def test_any_table_is_a_grid_or_a_config_error(table: dict[str, Any], named: bool) -> None:
    """Tables that TOML could hold, through the reader that follows tomllib, and through the settings."""
    from unittest.mock import patch

    if named:
        table["experiment"] = {"name": "x"}
        table["methods"] = [{**m, "name": f"m{i}"} for i, m in enumerate(table["methods"])]
    with patch.object(toml_file.tomllib, "loads", return_value=table):
        try:
            grid = parse_grid(b"", where="fuzz")
        except ConfigError:
            return
    faults = Faults()
    expand(grid, Path("out"), faults)
    assert all(isinstance(line, str) for line in faults.lines())


def test_the_ready_grids_can_be_read() -> None:
    for path in sorted((ROOT / "experiments").glob("*.toml")):
        grid, faults = read_grid(path), Faults()
        assert expand(grid, Path("out"), faults)
        assert not faults, faults.lines()
