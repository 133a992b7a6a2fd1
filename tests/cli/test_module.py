"""`fedsplit module ...` as a person types it, alone and in a federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsplit.cli.main import call
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.registry.registry import ModuleRegistry
from tests.registry.modules import facts, module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/modules: two versions of parts, one of strength."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSPLIT_REGISTRY", raising=False)
    with ModuleRegistry.open(tmp_path / "runs" / "modules", create=True) as kept:
        for i, name in enumerate("ab"):
            told = {"metrics": {"accuracy": 0.8 + i / 10}, "settings": {"rounds": i}}
            kept.add(module(tmp_path / name, name), facts(run=f"run-{name}", **told))
        number = module(tmp_path / "n", "n", target={"kind": "number"})
        kept.add(number, facts(task="引張強度", metrics={"mae": 0.25}, sites=()))
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert call(["module", *args, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> str:
    assert call(["module", *args]) == code
    told = capsys.readouterr()
    return told.out + told.err


@pytest.mark.usefixtures("here")
def test_a_version_is_promoted_compared_and_taken_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listed = answer(capsys, "list")["modules"]
    assert [m["module"] for m in listed] == ["parts#1", "parts#2", "引張強度#1"]
    assert {"digest", "task", "classes", "backbone_sha256", "parents", "sites"} <= listed[0].keys()
    assert "引張強度#1" in shown(capsys, "list")
    assert answer(capsys, "promote", "parts#1", "--by", "佐藤")["previous"] == ""
    moved = answer(capsys, "promote", "parts@latest", "--why", "better", "--expected", "parts#1")
    assert (moved["module"], moved["previous_module"]) == ("parts#2", "parts#1")
    error = answer(capsys, "promote", "parts#2", "--expected", "parts#1", code=1)["error"]
    assert error["kind"] == "RegistryError"
    told = shown(capsys, "show", "parts")
    for word in ("parts#2", "production", "better", "工場A", "rounds=1", "vit-glyphs"):
        assert word in told
    found = answer(capsys, "compare", "parts#1", "parts")
    assert found["metrics"] == {"accuracy": [0.8, 0.9]}
    assert found["settings"] == {"rounds": [0, 1]}
    assert "+10.00 points" in shown(capsys, "compare", "parts#1", "parts")
    assert "two tasks" in shown(capsys, "compare", "parts#1", "引張強度#1")
    assert "parts#1 now" in shown(capsys, "rollback", "parts")
    assert "nothing to go back to" in shown(capsys, "rollback", "parts", code=2)


def test_a_version_goes_elsewhere_and_is_removed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "tag", "parts#1", "spring")
    assert [m["module"] for m in answer(capsys, "list", "--tag", "spring")["modules"]] == [
        "parts#1"
    ]
    shown(capsys, "export", "parts#1", "out.zip")
    there = answer(capsys, "import", "out.zip", "--registry", "there")
    assert (there["module"], there["tags"]) == ("parts#1", ["spring"])
    shown(capsys, "promote", "parts#2")
    assert "in use" in shown(capsys, "remove", "parts#2", code=2)
    assert "removed" in shown(capsys, "remove", "parts#2", "--force")
    (here / "runs" / "modules" / "modules.db").write_bytes(b"nonsense" * 100)
    assert "fedsplit module reindex" in shown(capsys, "list", code=1)
    assert answer(capsys, "reindex")["versions"] == 2
    (here / "runs/modules/files" / there["digest"] / "version.json").unlink()
    assert len(answer(capsys, "reindex", code=3)["problems"]) == 1


def test_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSPLIT_REGISTRY", raising=False)
    for args, told in (
        (["list"], "no registry of modules near"),
        (["show", "parts", "--registry", "x"], "no registry of modules in"),
        (["import", "nothing.zip"], "there is no nothing.zip"),
        (["list", "--registry", "x", "--federation", "y"], "name two registries"),
    ):
        assert told in shown(capsys, *args, code=2)
    assert not (tmp_path / "runs").exists()


def test_a_trained_run_is_imported(
    trained_image_module: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "kept")
    found = answer(capsys, "import", str(trained_image_module), "--registry", place)
    assert (found["module"], found["outcome"]) == ("digits#1", "complete")
    assert len(found["sites"]) == 2


def test_a_federations_changes_are_in_its_audit_log(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = FederationFolder(tmp_path / "plant")
    folder.path.mkdir()
    assert call(["module", "list", "--federation", str(folder.path)]) == 2
    capsys.readouterr()
    (folder.path / "federation.toml").write_text(
        'format = 1\n[server]\nhost = "fl.example"\nport = 8443\n'
    )
    shown(capsys, "export", "parts#1", "out.zip")
    at = ("--federation", str(folder.path))
    shown(capsys, "import", "out.zip", *at)
    # Also where somebody names the registry by its folder.
    place = ("--registry", str(folder.modules))
    shown(capsys, "promote", "parts#1", "--by", "佐藤", "--alias", "candidate", *place)
    lines = list(audit.read(folder))
    assert [line["what"] for line in lines] == ["module-imported", "module-promoted"]
    assert (lines[1]["by"], lines[1]["module"]) == ("佐藤", "parts#1")
    folder.audit.unlink()
    folder.audit.mkdir()
    assert "cannot be written" in shown(capsys, "remove", "parts#1", "--force", *at, code=1)
    assert answer(capsys, "list", *at)["modules"]
