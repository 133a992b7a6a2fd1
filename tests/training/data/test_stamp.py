"""The state of a source's files: another one whenever something changed that reading would show."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.training.data import stamp


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "3.png").write_bytes(b"3333")
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(b"1111")
    (tmp_path / "data" / "a" / "2.png").write_bytes(b"2222")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "data"


def kept_times(path: Path, change: Callable[[Path], object]) -> None:
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda f: (f / "a" / "9.png").write_bytes(b"9"),
    "a file less": lambda f: (f / "a" / "1.png").unlink(),
    "another name": lambda f: (f / "a" / "1.png").rename(f / "a" / "7.png"),
    "other bytes": lambda f: kept_times(f / "a" / "1.png", lambda p: p.write_bytes(b"0000")),
    "another file in its place": lambda f: (f / "a" / "2.png").replace(f / "a" / "1.png"),
    "behind a link": lambda f: (f / "b" / "3.png").write_bytes(b"0000"),
    "a class more": lambda f: (f / "c").mkdir(),
    "all gone": lambda f: f.rename(f.parent / "away"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_folders_state(change: str, folder: Path) -> None:
    before = stamp(f"folder:{folder}")
    assert stamp(f"folder:{folder}") == before
    CHANGES[change](folder)
    assert stamp(f"folder:{folder}") != before


@pytest.mark.parametrize("kind", ["csv", "jsonl", "npz"])
def test_what_changes_a_files_state(kind: str, folder: Path) -> None:
    spec = f"{kind}:{folder / 'a' / '1.png'}"
    before = stamp(spec)
    assert stamp(spec) == before
    CHANGES["other bytes"](folder)
    assert stamp(spec) != before


def test_a_link_to_a_folder_above_ends(folder: Path) -> None:
    (folder / "a" / "up").symlink_to(folder)
    (folder / "up").symlink_to(folder.parent)
    assert stamp(f"folder:{folder}")


@pytest.mark.parametrize("spec", ["digits", "hf:owner/name", "nonsense", "folder:\0"])
def test_what_has_no_files_here_has_no_state(spec: str) -> None:
    assert stamp(spec) == ""
