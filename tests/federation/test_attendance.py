"""Who takes part: roster, surplus sites, numbers that are dead, names that two nodes say; and sites that come back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.core.orders import RollCall
from fedsplit.federation.server import known_nodes
from fedsplit.federation.server.newcomers import Newcomers
from fedsplit.federation.server.orders import Site
from tests.federation.conftest import prepared, settings, simulated
from tests.federation.grid import InProcessGrid


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fedsplit.federation.server.attendance.LOOK_S", 0.0)
    monkeypatch.setattr("fedsplit.federation.server.roll_call.GRACE_S", 60.0)
    return


def named(count: int) -> list[dict[str, Any]]:
    return [n | {"site": f"line-{'abcdef'[i]}"} for i, n in enumerate(simulated(count))]


def small(path: Path, **other: Any) -> RunConfig:
    return settings(path, **({"cut": "6,6", "rounds": 1, "max_samples": 90} | other))


def test_a_surplus_site_is_left_out_by_name_and_the_run_is_partial(tmp_path: Path) -> None:
    with prepared(small(tmp_path, sites=2), simulated(3)) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    assert [s.name for s in summary.sites] == ["site-0", "site-1"]
    (left,) = summary.left_out
    assert (left.site, left.rounds) == ("site-2", (0,))
    assert "name those that are to in roster" in left.reason


@pytest.mark.parametrize("in_simulation", [True, False])
def test_roster_says_who_takes_part(in_simulation: bool, tmp_path: Path) -> None:
    config = small(tmp_path, roster="line-b, line-c")
    with prepared(config, named(3), in_simulation=in_simulation) as (run, net):
        summary = run.go()
    assert (summary.outcome, summary.left_out) == ("complete", ())
    assert [s.name for s in summary.sites] == ["line-b", "line-c"]
    assert {net.place(m) for m in net.sent if m.metadata.message_type == "train"} == {2, 3}


def test_a_site_of_the_roster_that_is_missing_is_left_out_by_name(tmp_path: Path) -> None:
    config = small(tmp_path, roster="line-a,line-b,line-x")
    with prepared(config, named(3)) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    assert [entry.site for entry in summary.left_out] == ["line-x"]
    assert [s.name for s in summary.sites] == ["line-a", "line-b"]


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"roster": "a,,b"}, "give each site's name once"),
        ({"roster": "a,a"}, "give each site's name once"),
        ({"roster": "a,b,c", "sites": 2}, "roster names 3 sites, sites=2"),
        ({"roster": "a,b", "min-sites": 3}, "min-sites=3 is more than roster, which names 2"),
    ],
)
def test_a_roster_that_cannot_be(flat: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_flat(flat)
    assert "roster" not in RunConfig.from_flat({"roster": "a,b"}).flat_for_sites()


def test_a_dead_number_takes_no_place(tmp_path: Path) -> None:
    """Flower says that the node of a killed SuperNode is connected, and a minute later that it is not."""

    def dead(place: int, message: Message) -> bool:
        return place == 1 and message.metadata.group_id == "0"

    config = small(tmp_path, sites=2)
    nodes = named(3)
    with prepared(config, nodes, in_simulation=False, leaves=dead) as (run, _):
        summary = run.go()
    assert (summary.outcome, summary.left_out) == ("complete", ())
    assert [s.name for s in summary.sites] == ["line-b", "line-c"]


class Comings:
    """A hook for `leaves` that sees every message, and its run's grid once there is one."""

    def __init__(self) -> None:
        self.net: InProcessGrid
        self.done: set[str] = set()

    def first(self, event: str) -> bool:
        new = event not in self.done
        self.done.add(event)
        return new


def test_a_site_that_is_restarted_goes_on_under_its_new_number(tmp_path: Path) -> None:
    comings = Comings()

    def restarts(place: int, message: Message) -> bool:
        if place == 2 and message.metadata.group_id == "2" and comings.first("restart"):
            comings.net.join(comings.net.leave(2))
        return False

    config = small(tmp_path, rounds=5)
    with prepared(config, named(3), in_simulation=False, leaves=restarts) as (run, net):
        comings.net = net
        summary = run.go()
    missed = {s.name: s.rounds_missed for s in summary.sites}
    assert missed["line-a"] == missed["line-c"] == 0
    # Back in the same round, or in the next one where the others were faster than its answer.
    assert missed["line-b"] <= 2
    assert {m.site for m in run.ledger.metrics if m.round == 5} == {"line-a", "line-b", "line-c"}
    asked = [m for m in net.sent if net.place(m) == 4]
    assert [m.metadata.message_type for m in asked][:2] == ["query", "train"]
    assert known_nodes.read(tmp_path)["line-b"] == 102


def test_a_name_is_not_taken_from_a_site_that_is_there(tmp_path: Path) -> None:
    comings = Comings()

    def claims(place: int, message: Message) -> bool:
        group = message.metadata.group_id
        if group == "1" and comings.first("claim"):
            comings.net.join({**named(3)[0], "site": "line-b"})
            comings.net.join({**named(3)[0], "site": "stranger"})
        return place == 2 and group == "4"

    config = small(tmp_path, rounds=6, roster="line-a,line-b,line-c")
    with prepared(config, named(3), in_simulation=False, leaves=claims) as (run, net):
        comings.net = net
        summary = run.go()
    to_claimant = [m.metadata for m in net.sent if net.place(m) == 4]
    assert [m.message_type for m in to_claimant[:1]] == ["query"]
    # Only once the site itself is gone.
    assert all(int(m.group_id) >= 4 for m in to_claimant[1:])
    assert to_claimant[1:]
    # Who is no site of the run is asked its name and nothing else.
    assert [m.metadata.message_type for m in net.sent if net.place(m) == 5] == ["query"]
    assert {s.name for s in summary.sites} == {"line-a", "line-b", "line-c"}


def test_a_site_that_comes_while_the_run_lasts_takes_part_from_the_next_round(
    tmp_path: Path,
) -> None:
    comings = Comings()

    def comes(place: int, message: Message) -> bool:
        if message.metadata.group_id == "2" and comings.first("come"):
            comings.net.join(named(3)[2])
        return False

    config = small(tmp_path, rounds=6, cut="0,3;6,6")
    with prepared(config, named(3)[:2], in_simulation=False, leaves=comes) as (run, net):
        comings.net = net
        summary = run.go()
    assert (summary.outcome, [s.name for s in summary.sites]) == (
        "complete",
        ["line-a", "line-b", "line-c"],
    )
    of = sorted(m.round for m in run.ledger.metrics if m.site == "line-c")
    # From some round after the one in which it came, and then in all.
    assert of == list(range(of[0], 8))
    assert 3 <= of[0] <= 5
    assert any(f"line-c joined in round {of[0]}, at cut 0,3" in note for note in summary.notes)
    saved = json.loads((run.dir.path / "config.json").read_text(encoding="utf-8"))
    assert saved["sites"] == {"line-a": "0,3", "line-b": "6,6", "line-c": "0,3"}


def call(name: str, **other: Any) -> RollCall:
    values = {
        "site": name, "cut": "", "classes": ("a", "b"), "samples": 9, "test_samples": 3, "backbone_sha256": "",
        "fedsplit_version": "", "number": -1,
    }  # fmt: skip
    return RollCall.model_validate(values | other)


@pytest.mark.parametrize(
    ("flat", "said", "why"),
    [
        ({}, {}, ""),
        ({"roster": "line-a,line-c"}, {}, ""),
        ({"sites": 2}, {}, "sites=2 are wanted, and they are here"),
        ({"roster": "line-a,line-b"}, {}, "roster does not name it"),
        ({}, {"classes": ("a", "x")}, r"classes that the run was not begun with \(x\)"),
        ({"lora-aggregation": "flexlora"}, {}, ""),
        ({"lora-aggregation": "flexlora"}, {"cut": "1,6"}, "its way of averaging was settled"),
        ({"method": "centralised"}, {}, "no rounds in which sites work together"),
    ],
)
def test_a_newcomer_waits_for_the_next_round_or_is_told_why_not(
    flat: dict[str, Any], said: dict[str, Any], why: str
) -> None:
    def placed(node: int, call: RollCall, place: int) -> Site:
        del place
        return Site(call.site, node, Cut.parse(call.cut or "0,6"), 8, call)

    sites = [placed(n, call(f"line-{n}"), n) for n in (1, 2)]
    joined: list[str] = []
    new = Newcomers(
        config=RunConfig.from_flat({"min-sites": 1} | flat), classes=("a", "b"), sites=sites, place=placed,
        joined=lambda site: joined.append(site.name),
    )  # fmt: skip
    told = new.hear(7, call("line-c", **said))
    assert re.search(why or "takes part from the next round on", told)
    new.take_in({1, 2, 7})
    assert joined == ([] if why else ["line-c"])
    assert len(sites) == 2 + len(joined)


def test_of_two_newcomers_with_one_name_the_first_waits_and_one_that_left_is_forgotten() -> None:
    new = Newcomers(
        config=RunConfig.from_flat({}), classes=("a", "b"), sites=[], place=lambda *_: pytest.fail("it is gone"),
        joined=lambda site: None,
    )  # fmt: skip
    new.hear(7, call("line-c"))
    assert "node 7 says that name too, and said it first" in new.hear(8, call("line-c"))
    new.take_in({8})
    assert "takes part from the next round on" in new.hear(8, call("line-c"))


def test_of_two_nodes_with_one_name_the_one_that_had_it_before_keeps_it(tmp_path: Path) -> None:
    (tmp_path / known_nodes.FILE).write_text(json.dumps({"line-b": 103, "line-a": 7}))
    nodes = [
        n | {"site": name}
        for n, name in zip(simulated(3), ("line-a", "line-b", "line-b"), strict=True)
    ]
    with prepared(small(tmp_path), nodes, in_simulation=False) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    (left,) = summary.left_out
    assert left.site == "node 102"
    assert "another site is called 'line-b' too" in left.reason
    assert known_nodes.read(tmp_path) == {"line-a": 101, "line-b": 103}
    assert any(
        note.startswith("line-a: another node than in the run before") for note in summary.notes
    )


def test_of_two_nodes_with_one_name_the_other_follows_when_the_first_is_gone(
    tmp_path: Path,
) -> None:
    """A SuperNode that was restarted in the roll call: the node that it was answers too, and is gone a minute later."""

    def leaves(place: int, message: Message) -> bool:
        return place == 2 and message.metadata.group_id == "2"

    nodes = [
        n | {"site": name}
        for n, name in zip(simulated(3), ("line-a", "line-b", "line-b"), strict=True)
    ]
    (tmp_path / known_nodes.FILE).write_text(json.dumps({"line-b": 102}))
    config = small(tmp_path, rounds=4)
    with prepared(config, nodes, in_simulation=False, leaves=leaves) as (run, net):
        run.go()
    assert {m.site for m in run.ledger.metrics if m.round == 4} == {"line-a", "line-b"}
    to_second = [m.metadata.message_type for m in net.sent if net.place(m) == 3]
    assert to_second[:2] == ["query", "train"]


def test_a_node_that_was_gone_in_the_roll_call_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def sleeps(place: int, message: Message) -> bool:
        asked.append(place)
        return place == 2 and asked.count(2) == 1

    with prepared(
        small(tmp_path), named(2), in_simulation=False, leaves=sleeps
    ) as (run, net):  # fmt: skip
        config, looks = net.nodes[102], []
        listed = net.get_node_ids

        def wakes() -> list[int]:
            looks.append(None)
            if len(looks) == 4:
                net.nodes[102] = config
            return list(listed())

        monkeypatch.setattr(net, "get_node_ids", wakes)
        summary = run.go()
    assert (summary.outcome, [s.name for s in summary.sites]) == ("complete", ["line-a", "line-b"])


@pytest.mark.parametrize("text", ["", "[", '["a"]', '{"a": "1"}', '{"a": true}', "[" * 100_000])
def test_known_nodes_that_are_damaged_count_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / known_nodes.FILE).write_text(text)
    assert known_nodes.read(tmp_path) == {}
    known_nodes.write(tmp_path, {"a": 5})
    assert known_nodes.read(tmp_path) == {"a": 5}
