"""The strings that say which tasks a run has and who holds them: what reads, what does not, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.names import MAX_TASK_CHARS, is_name, normalised
from fedsplit.core.tasks import MAX_TASKS, parse_held, parse_holders, parse_tasks

TWO = {"tasks": "digits=digits;shapes=npz:shapes.npz"}
LETTERS = st.characters(categories=["L", "Nd", "Mn"], include_characters="-_.")
names = (
    st.text(LETTERS, min_size=1, max_size=MAX_TASK_CHARS)
    .map(normalised)
    .filter(lambda n: is_name(n, MAX_TASK_CHARS) and not n.casefold().endswith(".json"))
)
some_names = st.lists(names, min_size=1, max_size=MAX_TASKS, unique_by=str.casefold)
sources = st.text(
    st.characters(exclude_characters=";", exclude_categories=["Cs", "Cc", "Z"]), min_size=1
)


def faults(flat: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    return str(caught.value)


@given(st.data())
def test_what_is_written_reads_back(data: st.DataObject) -> None:
    wanted = {name: data.draw(sources) for name in data.draw(some_names)}
    text = ";".join(f"{name}={source}" for name, source in wanted.items())
    assert parse_tasks(text) == wanted
    assert list(parse_tasks(text)) == list(wanted)
    assert parse_held(text) == wanted


@given(st.data())
def test_holders_read_back(data: st.DataObject) -> None:
    numbers = st.frozensets(st.integers(0, 99_999), min_size=1, max_size=20)
    wanted = {name: data.draw(numbers) for name in data.draw(some_names)}
    text = ";".join(f"{name}:{','.join(map(str, sorted(who)))}" for name, who in wanted.items())
    assert parse_holders(text) == wanted


@given(st.text() | st.text("ab=:;-,.019 ").map(lambda text: f"a{text}"))
def test_any_text_reads_or_is_a_config_error(text: str) -> None:
    for read in (parse_tasks, parse_holders, parse_held):
        try:
            found = read(text)
        except ConfigError:
            continue
        assert len(found) <= MAX_TASKS
        assert all(is_name(name, MAX_TASK_CHARS) for name in found)


def test_ranges_of_sites() -> None:
    assert parse_holders("a:0-3,7; b : 2 - 2") == {
        "a": frozenset({0, 1, 2, 3, 7}),
        "b": frozenset({2}),
    }
    assert parse_tasks("a=csv:x=1.csv;b=digits") == {"a": "csv:x=1.csv", "b": "digits"}
    assert parse_held("a;b=folder:/b") == {"a": "", "b": "folder:/b"}
    assert parse_tasks("") == parse_holders("") == parse_held("") == {}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tasks", "digits", "digits has no source"),
        ("tasks", "a=x;a=y", "a is there twice"),
        ("tasks", "a=x;A=y", "A is there twice"),
        ("tasks", "../up=x", "no name of a task"),
        ("tasks", "a=x;;b=y", "no name of a task"),
        ("tasks", "a=x;", "no name of a task"),
        ("tasks", "config.json=x", "would be the name of a file of the run"),
        ("tasks", ";".join(f"t{i}=digits" for i in range(17)), "at most 16"),
        ("task-holders", "digits", "are no sites"),
        ("task-holders", "digits:", "are no sites"),
        ("task-holders", "digits:3-1", "3-1 of digits is no range of sites"),
        ("task-holders", "digits:0-999999", "is no range of sites"),
        ("task-holders", "digits:-1", "are no sites"),
        ("task-holders", "digits:²", "are no sites"),
        ("task-holders", "digits:" + "9" * 5000, "are no sites"),
    ],
)
def test_bad_strings_are_refused_with_their_key(key: str, value: str, words: str) -> None:
    text = faults({key: value})
    assert f"- {key}" in text
    assert words in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"task-holders": "forms:0-3"}, "names forms, the run's tasks are digits, shapes"),
        ({"task-holders": "shapes:1"}, "gives shapes to fewer than min-sites=2 sites"),
        (
            {"task-holders": "shapes:1-4", "sites": 4},
            "names site 4, sites=4 are numbered from 0 to 3",
        ),
        ({"classes": "a,b"}, "classes=a,b are those of one task"),
        ({"start-module": "runs/x/module"}, "start-module=runs/x/module is of one task"),
        ({"run-name": "r" * 100, "tasks": f"{'t' * 60}=digits"}, "160 characters together"),
    ],
)
def test_what_does_not_go_with_several_tasks(other: dict[str, Any], words: str) -> None:
    assert words in faults(TWO | other)


def test_the_settings_of_one_task() -> None:
    config = RunConfig.from_flat(TWO | {"task-holders": "shapes:2-5"})
    assert RunConfig.resolved(config.flat()) == config
    assert config.task.sources == {"digits": "digits", "shapes": "npz:shapes.npz"}
    assert config.task.holders == {"shapes": frozenset({2, 3, 4, 5})}
    one = config.of_task("shapes")
    assert (one.task.name, one.task.data, one.task.sources) == (
        "shapes",
        "npz:shapes.npz",
        config.task.sources,
    )
    assert RunConfig.from_flat(one.flat_for_sites()) == one
    assert RunConfig.of(task="a", data="csv:a.csv").task.sources == {"a": "csv:a.csv"}


def test_sites_listed_over_and_over_are_refused() -> None:
    with pytest.raises(ConfigError, match="lists more than 100000 sites"):
        parse_holders("a:" + ",".join(["0-99999"] * 1000))
