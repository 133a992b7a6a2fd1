"""A version as a file: it comes out as it went in, and a hostile one does nothing."""

from __future__ import annotations

import contextlib
import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.registry.registry import ModuleRegistry
from tests.registry.modules import facts, module


@pytest.fixture
def registry(tmp_path: Path) -> ModuleRegistry:
    return ModuleRegistry.open(tmp_path / "modules", create=True)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    kept = ModuleRegistry.open(tmp_path / "elsewhere", create=True)
    kept.add(module(tmp_path / "m"), facts(notes=("注意",)))
    kept.tag("parts#1", "春")
    kept.export("parts#1", tmp_path / "parts.zip")
    return tmp_path / "parts.zip"


def test_a_version_travels(registry: ModuleRegistry, exported: Path, tmp_path: Path) -> None:
    registry.add(module(tmp_path / "own", "own"), facts(run="own"))
    there = ModuleRegistry.open(tmp_path / "elsewhere").get("parts#1")
    here = registry.import_(exported)
    assert here.name == "parts#2"
    assert here.model_copy(update={"number": 1}) == there
    assert registry.import_(exported) == here
    registry.export("parts#2", tmp_path / "again.zip")
    assert len(registry.versions()) == 2
    assert not list(registry.path.glob(".import*"))


def entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed(file: Path, change: Callable[[zipfile.ZipFile], None], *without: str) -> Path:
    kept = {name: data for name, data in entries(file).items() if name not in without}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
        change(archive)
    return file


def link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("zeros", bytes(2**20), zipfile.ZIP_DEFLATED)


def comment(archive: zipfile.ZipFile) -> None:
    archive.comment = b"hello"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a.writestr("../out", b"x"), "plain file name"),
        (lambda a: a.writestr("/tmp/out", b"x"), "plain file name"),
        (lambda a: a.writestr("folder/out", b"x"), "plain file name"),
        (lambda a: a.writestr(".hidden", b"x"), "plain file name"),
        (lambda a: a.writestr("C:out", b"x"), "plain file name"),
        (lambda a: a.writestr("FEDSPLIT.JSON", b"{}"), "twice"),
        (link, "a link"),
        (bomb, "compressed"),
        (comment, "without a comment"),
        (lambda a: a.writestr("more", b"x"), "digest"),
        (lambda a: [a.writestr(f"f{i}", b"x") for i in range(100)], "lists 103 files"),
    ],
)
def test_a_hostile_file_does_nothing(
    change: Callable[[zipfile.ZipFile], None], told: str, registry: ModuleRegistry, exported: Path
) -> None:
    before = sorted(registry.path.parent.rglob("*"))
    with pytest.raises(ConfigError, match=told):
        registry.import_(changed(exported, change))
    assert registry.versions() == []
    assert sorted(registry.path.parent.rglob("*")) == before


def test_a_file_that_lies_is_refused(registry: ModuleRegistry, exported: Path) -> None:
    whole = exported.read_bytes()
    record = entries(exported)["version.json"]
    for other, told in (
        (b"{}", "Field required"),
        (b"[" * 100_000, "recursion|Expected|EOF"),
        (record.replace(b'"parts"', b'"../.."'), "no name"),
        (record.replace(b'"accuracy": 0.9', b'"accuracy": NaN'), "finite|NaN|expected"),
    ):
        exported.write_bytes(whole)
        lies = changed(
            exported, lambda a, text=other: a.writestr("version.json", text), "version.json"
        )  # type: ignore[misc]
        with pytest.raises(ConfigError, match=told):
            registry.import_(lies)
    exported.write_bytes(whole[:-30])
    with pytest.raises(ConfigError, match="does not end"):
        registry.import_(exported)
    exported.write_bytes(whole.replace(b"weights", b"wEights"))
    with pytest.raises(ConfigError, match="CRC"):
        registry.import_(exported)
    assert registry.versions() == []


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_are_imported_whole_or_refused(
    data: st.DataObject, registry: ModuleRegistry, exported: Path
) -> None:
    """Bytes changed anywhere, most of all in the lists of files: never another error, never something else."""
    whole = bytearray(exported.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        tail = data.draw(st.booleans())
        at = data.draw(st.integers(max(0, len(whole) - 300) if tail else 0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    file = exported.with_name("fuzzed.zip")
    file.write_bytes(whole)
    with contextlib.suppress(FedsplitError):
        version = registry.import_(file)
        assert registry.files(version)
        registry.remove(version.name)
    assert {p.name for p in registry.path.iterdir()} <= {
        "modules.db",
        "files",
        "aliases.json",
        ".lock",
    }
    assert list((registry.path / "files").iterdir()) == []


def test_what_is_no_zip(registry: ModuleRegistry, tmp_path: Path) -> None:
    for content in (b"", b"PK\x05\x06" + bytes(18), io.BytesIO().getvalue(), b"text" * 100):
        (tmp_path / "no.zip").write_bytes(content)
        with pytest.raises(ConfigError, match="no file of `fedsplit module export`"):
            registry.import_(tmp_path / "no.zip")
