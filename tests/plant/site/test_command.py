"""`fedsplit site` as a program: exit codes, one JSON object, another clock, disks that are full or cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsplit.cli.main import call
from fedsplit.core.cut import Cut
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import device_part
from fedsplit.model.store import BackboneStore
from fedsplit.plant.site.join import Joined

from .server import Control

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


SPEC = ModuleSpec(classes=("a", "b"), kind="classifier")
Site = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def site(capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    """Runs a command: exit code, the JSON object, what a person reads."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}

    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        code = call(["site", *map(str, words), "--json"])
        told = capsys.readouterr()
        assert "Traceback" not in told.err, told.err
        return code, json.loads(told.out), told.err

    yield run
    for name, handler in before.items():
        signal.signal(name, handler)


@contextlib.contextmanager
def a_disk(where: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def test_join_fetch_clean_and_install(
    site: Site, control: Control, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.plant.install.has_systemd", lambda: False)
    where, code = tmp_path / "site", control.code().text()
    data = f"folder:{pictures}"
    asked = ("join", code, "--dir", where, "--data", data, "--task", "inspection")
    exit_code, made, said = site(*asked)
    assert exit_code == 0, said
    assert made["site"] == "line-a"
    assert made["samples"] == 12
    assert made["classes"] == {"good": 6, "傷 deep": 6}
    assert "12 images in 2 classes: good (6), 傷 deep (6)" in said
    assert code not in said
    levels = {check["name"]: check["level"] for check in made["checks"]}
    assert levels["membership"] == levels["backbone"] == levels["data"] == "green"
    assert (exit_code, made["backbone_sha256"]) == (0, Backbone.find("vit-glyphs").sha256)
    store = BackboneStore(where / "backbones")
    before = store.total_bytes()
    exit_code, told, said = site("fetch", where, "--cut", "0,6")
    assert (exit_code, told["bytes"], told["cuts"]) == (0, before, ["0,6"])
    assert device_part(
        Backbone.find(str(store.ready(made["backbone_sha256"], Cut(1, 5)))), Cut(1, 5), SPEC
    )
    exit_code, told, said = site("fetch", where, "--cut", "0,7")
    assert (exit_code, told["error"]["kind"]) == (2, "ConfigError")
    exit_code, told, said = site("clean", where)
    assert (exit_code, told["freed_bytes"], told["errors"]) == (0, 0, [])
    exit_code, told, said = site("install", where, "--name", "fedsplit-line-a")
    assert (exit_code, told["installed"]) == (1, False)
    unit = Path(told["unit"]).read_text(encoding="utf-8")
    assert f"site run {where}" in unit
    assert "RestartPreventExitStatus=4" in unit
    # The same code again, elsewhere: the server's words.
    exit_code, told, said = site(*asked[:3], tmp_path / "other", *asked[4:])
    assert exit_code == 1
    assert told["error"]["kind"] == "ServerRefusalError"
    assert "used already" in told["error"]["message"]
    assert not (tmp_path / "other").exists()


def test_a_backbone_that_does_not_come_leaves_a_member(
    site: Site, control: Control, pictures: Path, tmp_path: Path
) -> None:
    control.backbone._private = frozenset({0})
    data = f"folder:{pictures}"
    where = tmp_path / "site"
    exit_code, told, _ = site(
        "join", control.code().text(), "--dir", where, "--data", data, "--task", "t"
    )
    assert (exit_code, told["error"]["kind"]) == (1, "ServerRefusalError")
    said = told["error"]["message"]
    assert "block 0 is private" in said
    assert f"is a member all the same; go on with: fedsplit site fetch {where}" in said
    assert site("fetch", where, "--cut", "0,6")[0] == 0


def test_a_code_that_is_mistyped_or_none(site: Site, control: Control, tmp_path: Path) -> None:
    text = control.code().text()
    other = text[:20] + ("0" if text[20] != "0" else "1") + text[21:]
    for code, part in ((other, "mistyped"), (text[:40], "too short"), ("hello", "not a join code")):
        exit_code, told, _ = site("join", code, "--dir", tmp_path / "site")
        assert exit_code == 2
        assert part in told["error"]["message"]
        assert code not in told["error"]["message"]
    assert not (tmp_path / "site").exists()


def test_a_revoked_site_has_an_exit_code_of_its_own(
    site: Site, control: Control, joined: Callable[..., Joined]
) -> None:
    folder = joined().folder
    control.standing = "revoked"
    exit_code, told, _ = site("run", folder.path)
    assert (exit_code, told["error"]["kind"]) == (4, "NotMemberError")


def test_commands_in_a_folder_that_is_none(site: Site, tmp_path: Path) -> None:
    for command in ("run", "clean"):
        exit_code, told, _ = site(command, tmp_path / "nothing")
        assert exit_code == 2
        assert "is no site folder" in told["error"]["message"]


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_a_clock_that_is_an_hour_off(control: Control, pictures: Path, tmp_path: Path) -> None:
    """With another clock in the whole process: certificates, too, are looked at by it."""
    done = subprocess.run(
        [
            sys.executable, "-m", "fedsplit.cli.main", "site", "join", control.code().text(),
            "--dir", str(tmp_path / "site"), "--data", f"folder:{pictures}", "--task", "t",
        ],
        capture_output=True, text=True, check=False, timeout=120,
        env={
            **os.environ,
            "LD_PRELOAD": str(FAKETIME), "FAKETIME": "+1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        },
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "s ahead of the server's" in done.stderr
    assert not (tmp_path / "site").exists()
    assert control.node_keys == []


@pytest.mark.parametrize(
    ("options", "part"), [("size=1m", "MB free"), ("ro,size=200m", "cannot be made")]
)
def test_a_disk_that_is_full_or_cannot_be_written(
    site: Site, control: Control, pictures: Path, tmp_path: Path, options: str, part: str
) -> None:
    with a_disk(tmp_path / "disk", options) as disk:
        exit_code, told, _ = site(
            "join", control.code().text(), "--dir", disk / "site",
            "--data", f"folder:{pictures}", "--task", "t",
        )  # fmt: skip
        assert exit_code == 2
        assert part in told["error"]["message"]
        assert not list(disk.iterdir())
    assert control.node_keys == []


def test_a_site_on_a_disk_that_fills_up_and_cannot_be_written(
    site: Site, joined: Callable[..., Joined], tmp_path: Path
) -> None:
    with a_disk(tmp_path / "disk", "size=70m") as disk:
        folder = joined(folder=disk / "site").folder
        with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 65536):
                pass
        exit_code, told, _ = site("run", folder.path)
        assert (exit_code, told["error"]["kind"]) == (1, "FolderError")
        assert "No space left" in told["error"]["message"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        exit_code, told, _ = site("run", folder.path)
        assert (exit_code, told["error"]["kind"]) == (1, "ServiceError")
        assert "Read-only file system" in told["error"]["message"]
        (exit_code, told, _) = site("clean", folder.path, "--apply", "--all-backbones")
        assert (exit_code, told["errors"]) == (0, [])  # there is nothing to remove
    assert not list((tmp_path / "disk").iterdir())
