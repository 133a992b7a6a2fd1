"""Run files: the same keys in tables, each fault with its place, and any bytes give settings or a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.config import FIELDS, SECTIONS, RunConfig
from fedsplit.core.config.run_file import parse_run_file, read_run_file
from fedsplit.core.errors import ConfigError
from fedsplit.core.toml_file import MAX_FILE_BYTES


def parsed(text: str) -> dict[str, object]:
    return dict(parse_run_file(text.encode(), where="job.toml"))


def test_every_key_has_its_place_in_a_table() -> None:
    flat = RunConfig.from_flat({}).flat()
    lines = [
        line
        for table in SECTIONS
        for line in (
            f"[{table}]",
            *(f"{k} = {json.dumps(flat[k])}" for k, of in FIELDS.items() if of.section == table),
        )
    ]
    assert parsed("\n".join(lines)) == flat


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\ncut = '1,5'", "[train] cut belongs into table [placement]; move it there"),
        ("[train]\nround = 3", "[train] unknown key 'round'; did you mean 'rounds'?"),
        ("[train]\nlearnin-rate = 3", "did you mean 'learning-rate'?"),
        ("[server]\nbatchsize = 3", "[server] unknown key 'batchsize'; did you mean 'batch-size'?"),
        ("[trian]\nrounds = 3", "unknown table [trian]; did you mean 'train'?"),
        ("[x]\nrounds = 3", "unknown table [x]; there are the tables run, task,"),
        ("rounds = 3", "rounds stands outside the tables; put it into table [train]"),
        ("train = 3", "train is a table; write its keys below [train]"),
        ("[train]\nrounds = [3]", "[train] rounds is an array; a text, a number, true or false"),
        ("[task.data]\nx = 1", "[task] data is a table; a text"),
        ("[train]\nrounds = 2026-01-01", "[train] rounds is a date or a time"),
        ('[run]\nrun-name = "default"', "the word stands for a key that is not given"),
        ("[train", "job.toml is not TOML: "),
        ("[train]\nrounds = 3\nrounds = 4", "Cannot overwrite a value"),
        ("x = " + "[" * 5000, "is not TOML"),
        ("#" * MAX_FILE_BYTES + "#", "is larger than 1048576 bytes"),
    ],
)
def test_a_fault_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    assert said in str(caught.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("a = 1\n[train]\nb = 2\ncut = '0,4'\n[c]\n")
    assert str(caught.value).count("\n  - ") == 4
    with pytest.raises(ConfigError, match="and 400 more"):
        parsed("".join(f"a{i} = 1\n" for i in range(500)))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path, Path("nul\0")):
        with pytest.raises(ConfigError, match="give the path of a TOML file"):
            read_run_file(path)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_settings_or_a_fault(data: bytes) -> None:
    try:
        flat = parse_run_file(data, where="x")
    except ConfigError:
        return
    assert flat.keys() <= FIELDS.keys()
