"""`fedsplit federation`: who belongs to a federation, from the command line, with the server up and down."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from fedsplit.cli.main import call
from fedsplit.core.errors import FederationError
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.wire import Report
from tests.plant.server.test_registry import join


class Command:
    """`fedsplit federation ARGS --federation DIR --json`, in this process."""

    def __init__(self, folder: FederationFolder, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder, self._capsys = folder, capsys
        self.told = ""

    def __call__(self, *args: str, code: int = 0) -> dict[str, Any]:
        self._capsys.readouterr()
        found = call(["federation", *args, "--federation", str(self._folder.path), "--json"])
        out = self._capsys.readouterr()
        self.told = out.err
        assert found == code, out.err
        answer = json.loads(out.out)
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def federation(folder: FederationFolder, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(folder, capsys)


def test_a_code_is_printed_and_good_for_the_time_asked(
    federation: Command, folder: FederationFolder
) -> None:
    made = federation("add-site", "line-1", "--valid", "90m")
    assert made["site"] == "line-1"
    assert abs(made["expires"] - time.time() - 5400) < 60
    code = JoinCode.parse(made["code"])
    assert "site join CODE" in federation.told
    assert made["code"] not in federation.told
    with Registry(folder) as registry:
        join(registry, code, 1)


def test_list_shows_how_each_site_stands(federation: Command, folder: FederationFolder) -> None:
    assert federation("list") == {"sites": []}
    assert "add-site NAME" in federation.told
    codes = {n: JoinCode.parse(federation("add-site", n)["code"]) for n in ("検査 1", "b", "c")}
    with Registry(folder) as registry:
        for number, name in enumerate(["検査 1", "b"]):
            join(registry, codes[name], number)
        registry.seen("検査 1", Report(state="working", fedsplit_version="0.1.0"))
    federation("revoke", "b")
    sites = {site["name"]: site for site in federation("list")["sites"]}
    assert {name: site["state"] for name, site in sites.items()} == {
        "検査 1": "member",
        "b": "revoked",
        "c": "invited",
    }
    assert sites["検査 1"]["version"] == "0.1.0"
    assert sites["検査 1"]["certificate_ends"] > time.time()
    for word in ("working", "revoked", "invited until", "検査 1"):
        assert word in federation.told


def test_a_site_is_revoked_and_rotated_while_the_server_is_down(
    federation: Command, folder: FederationFolder
) -> None:
    code = JoinCode.parse(federation("add-site", "line-1")["code"])
    with Registry(folder) as registry:
        join(registry, code, 1)
    again = federation("rotate", "line-1")
    assert JoinCode.parse(again["code"]).id != code.id
    assert "--again" in federation.told
    assert federation("revoke", "line-1")["flower_told"] is False
    assert "when it starts" in federation.told
    assert json.loads(folder.revoked.read_text())["names"] == ["line-1"]
    assert "is revoked" in federation("rotate", "line-1", code=2)["error"]["message"]


def test_a_site_is_revoked_at_flower_while_the_server_is_up(
    federation: Command, folder: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsplit.plant.server import node_keys, runs
    from tests.plant.server.test_control import Flower

    flower = Flower()
    code = JoinCode.parse(federation("add-site", "line-1")["code"])
    with Registry(folder) as registry:
        join(registry, code, 1)
        (key,) = registry.node_keys()
    flower.register(key)
    monkeypatch.setattr(runs, "present", lambda _folder: None)
    monkeypatch.setattr(node_keys, "of_folder", lambda _folder: flower())
    assert federation("revoke", "line-1")["flower_told"] is True
    assert flower.alive == set()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can")
def test_what_root_makes_in_a_services_folder_is_the_services(
    federation: Command, folder: FederationFolder
) -> None:
    for path in (folder.path, *folder.path.rglob("*")):
        os.chown(path, 12345, 12345)
    made = federation("add-site", "line-1")
    with Registry(folder) as registry:
        join(registry, JoinCode.parse(made["code"]), 1)
    federation("revoke", "line-1")
    owners = {p.name: p.stat().st_uid for p in folder.path.rglob("*")}
    assert {"registry.db", "audit.jsonl", "revoked.json", "run"} <= owners.keys()
    assert set(owners.values()) == {12345}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["add-site", "line-1"], "is invited already"),
        (["add-site", "LINE-1"], "too like"),
        (["add-site", "x", "--valid", "24"], "30m, 24h or 7d"),
        (["add-site", "x", "--valid", "31d"], "up to 30 days"),
        (["add-site", "x", "--valid", "0h"], "a time is wanted"),
        (["revoke", "nobody"], "no site 'nobody'"),
        (["rotate", "nobody"], "no site 'nobody'"),
    ],
)
def test_bad_input_is_a_short_text_and_exit_code_2(
    args: list[str], told: str, federation: Command
) -> None:
    federation("add-site", "line-1")
    error = federation(*args, code=2)["error"]
    assert error["kind"] == "ConfigError"
    assert told in error["message"]
    assert [s["name"] for s in federation("list")["sites"]] == ["line-1"]


def test_another_folder_is_not_taken_for_one(federation: Command, folder: FederationFolder) -> None:
    (folder.path / "federation.toml").unlink()
    assert "is no federation folder" in federation("list", code=2)["error"]["message"]
    assert not folder.registry.exists()


def test_present_says_that_no_server_is_up(folder: FederationFolder) -> None:
    from fedsplit.plant.server.node_keys import of_folder

    with pytest.raises(FederationError, match="is not up"):
        of_folder(folder)
