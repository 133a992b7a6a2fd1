"""The run's settings: every fault at once, every key with its type, and the same defaults as Flower's."""

from __future__ import annotations

import contextlib
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import fuse_dicts
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsplit.core.config import NOT_GIVEN, RunConfig, parse_set
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def faults(flat: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    return str(caught.value)


def test_pyproject_has_every_key_as_not_given() -> None:
    """Flower merges what was given onto this table, and checks the keys alone: so what was given is known."""
    table = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert list(table) == list(RunConfig.keys())
    assert set(table.values()) == {NOT_GIVEN}
    assert RunConfig.from_flat(table).flat() == RunConfig.from_flat({}).flat()
    assert not RunConfig.from_flat(table).given
    fused = fuse_dicts(table, {"rounds": 7, "learning-rate": 0.5, "encoder-insecure": True})
    assert RunConfig.from_flat(fused).given == {"rounds", "learning-rate", "encoder-insecure"}


def test_flat_round_trip() -> None:
    config = RunConfig.from_flat({"cut": "0,4;2,2", "rounds": 9, "encoder-insecure": True})
    assert RunConfig.resolved(config.flat()) == config
    assert config.flat()["encoder-insecure"] is True
    assert hash(RunConfig.resolved(config.flat())) == hash(config)


def test_flat_values_are_what_flower_carries() -> None:
    assert all(type(v) in {str, int, float, bool} for v in RunConfig().flat().values())
    assert not any("_" in key for key in RunConfig().flat())


def test_every_fault_is_reported_at_once() -> None:
    text = faults(
        {
            "cut": "5",
            "rounds": -1,
            "learning-rate": "fast",
            "partition": "zipf",
            "method": "sgd",
            "lora_rank": 4,
            "epochs": 3,
        }
    )
    assert text.count("\n  - ") == 7
    assert "unknown key 'lora_rank'; did you mean 'lora-rank'?" in text
    assert "unknown key 'epochs'; did you mean 'local-epochs'?" in text
    assert "cut='5'" in text or "cut '5' is not a cut" in text
    assert "rounds=-1: " in text
    assert "learning-rate='fast': " in text
    assert "partition 'zipf' is not known; use iid, dirichlet:ALPHA" in text
    assert "method 'sgd' is not known; there are fedv, fedvz" in text


def test_an_unknown_key_unlike_any_lists_them_all() -> None:
    text = faults({"xyzzy": 1})
    assert text.endswith(f"known keys: {', '.join(sorted(RunConfig.keys()))}")


def test_settings_that_contradict_each_other_are_all_named() -> None:
    text = faults({"sites": 2, "min-sites": 3, "encoder-tls-cert": "a.pem"})
    assert "min-sites=3 is more than sites=2" in text
    assert "encoder-tls-cert and encoder-tls-key go together" in text
    assert text.count("\n  - ") == 2
    assert RunConfig.from_flat({"sites": 0, "min-sites": 3}).server.min_sites == 3


def test_a_long_value_is_not_repeated_in_full() -> None:
    long = "9" * 5000
    assert len(faults({"cut": long, "run-name": long, "partition": long, long: 1})) < 3000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", "many"),
        ("rounds", 1.5),
        ("learning-rate", -1),
        ("learning-rate", math.nan),
        ("learning-rate", math.inf),
        ("weight-decay", -0.1),
        ("deadline-s", math.inf),
        ("test-fraction", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("in-flight", 0),
        ("task", "../up"),
        ("task", ""),
        ("task", ".."),
        ("task", "a\n"),
        ("run-name", "a/b"),
        ("codec", "FP32"),
        ("backbone", 3),
        ("encoder-insecure", "maybe"),
        ("encoder-training", "thawed"),
    ],
)
def test_a_bad_value_is_named_with_its_key(key: str, value: object) -> None:
    assert f"{key}={value!r}: " in faults({key: value})


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_run_name_is_a_folder_of_its_own(name: str) -> None:
    assert "run-name" in faults({"run-name": name})


@pytest.mark.parametrize("good", ["iid", "dirichlet:0.3", "quantity:1e-1", "pathological:2"])
def test_known_partitions(good: str) -> None:
    assert RunConfig.from_flat({"partition": good}).task.partition == good


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "IID",
        "iid:",
        "dirichlet",
        "dirichlet:",
        "dirichlet:0",
        "dirichlet:-1",
        "dirichlet:nan",
        "dirichlet:inf",
        "quantity:x",
        "pathological:0",
        "pathological:1.5",
        "pathological:²",
        "pathological:" + "9" * 5000,
    ],
)
def test_other_partitions_list_the_known_ones(bad: str) -> None:
    assert "is not known; use iid, dirichlet:ALPHA, pathological:CLASSES" in faults(
        {"partition": bad}
    )


def test_derived_values() -> None:
    config = RunConfig.from_flat({"cut": "0,4; 2,2", "classes": " ok, scratch ,,dent"})
    assert config.placement.cuts == (Cut(0, 4), Cut(2, 2))
    assert config.task.class_names == ("ok", "scratch", "dent")
    assert RunConfig().task.class_names is None


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.rounds = 3  # type: ignore[misc]


def test_set_pairs_are_typed_by_their_key() -> None:
    flat = parse_set(
        [
            "rounds=3",
            "learning-rate=1e-3",
            "deadline-s=5",
            "compare-local-only=True",
            "run-name=7",
            "cut=0,4;2,2",
            "data=csv:a=b.csv",
            "encoder-insecure=false",
        ]
    )
    assert flat == {
        "rounds": 3,
        "learning-rate": 1e-3,
        "deadline-s": 5.0,
        "compare-local-only": True,
        "run-name": "7",
        "cut": "0,4;2,2",
        "data": "csv:a=b.csv",
        "encoder-insecure": False,
    }
    assert type(flat["deadline-s"]) is float
    assert RunConfig.from_flat(flat).server.compare_local_only


def test_set_faults_come_together() -> None:
    with pytest.raises(ConfigError, match="'rounds' has no '='; use KEY=VALUE"):
        parse_set(["rounds", "seed=1"])
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(parse_set(["lora_rank=3", "seed=1", "qqq=1", "cut=9"]))
    text = str(caught.value)
    assert "did you mean 'lora-rank'?" in text
    assert "unknown key 'qqq'" in text
    assert "cut '9' is not a cut" in text
    assert text.count("\n  - ") == 3


@pytest.mark.parametrize("value", ["--5", "²", "9" * 5000, "1e3", "", "-"])
def test_set_leaves_what_is_no_number_to_the_settings_own_check(value: str) -> None:
    flat = parse_set([f"rounds={value}"])
    assert flat == {"rounds": value}
    with pytest.raises(ConfigError, match="rounds="):
        RunConfig.from_flat(flat)


scalars = (
    st.text(max_size=30)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.from_regex(r"(dirichlet|pathological|quantity):[0-9.e-]{0,6}", fullmatch=True)
    | st.from_regex(r"[0-9]{1,3},[0-9]{1,3}(;[0-9],[0-9])?", fullmatch=True)
)
flats = st.dictionaries(st.sampled_from(RunConfig.keys()) | st.text(max_size=15), scalars)


@settings(max_examples=300, deadline=None)
@given(flats)
def test_arbitrary_flat_dicts_raise_config_errors_alone(flat: dict[str, Any]) -> None:
    try:
        config = RunConfig.from_flat(flat)
    except ConfigError:
        return
    assert RunConfig.resolved(config.flat()) == config
    assert config.placement.cuts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(max_size=20)
        | st.builds("{}={}".format, st.sampled_from(RunConfig.keys()), st.text("-0123456789.e²")),
        max_size=4,
    )
)
def test_arbitrary_set_pairs_raise_config_errors_alone(pairs: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        RunConfig.from_flat(parse_set(pairs))
