"""What goes wrong around a registry: a lost database, changed files, two at once, a full disk. Nothing is lost."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.registry.module_files import module_digest
from fedsplit.registry.registry import ModuleRegistry
from tests.registry.modules import facts, module
from tests.small_disk import small_disk


@pytest.fixture
def registry(tmp_path: Path) -> ModuleRegistry:
    """Three versions of parts, one of bolts; the second one of parts is in use and has a tag."""
    kept = ModuleRegistry.open(tmp_path / "modules", create=True)
    for name in "abc":
        kept.add(module(tmp_path / name, name), facts(run=name))
    kept.add(module(tmp_path / "d", "d"), facts(task="bolts"))
    kept.promote("parts#1", by="Sato")
    kept.promote("parts#2", by="Sato", measured={"line-b": 0.5})
    kept.tag("parts#2", "spring")
    kept.remove("parts#3")
    return kept


@pytest.mark.parametrize("damage", ["gone", "empty", "text", "torn"])
def test_a_damaged_database_is_made_anew(registry: ModuleRegistry, damage: str) -> None:
    database = registry.path / "modules.db"
    before = (registry.versions(), registry.aliases(), registry.history())
    whole = database.read_bytes()
    broken = {"empty": b"", "text": b"damaged " * 2000, "torn": whole[:4096] + bytes(4096)}
    if damage == "gone":
        database.unlink()
    else:
        database.write_bytes(broken[damage])
    with pytest.raises(RegistryError, match=r"fedsplit module reindex --registry .*modules"):
        ModuleRegistry.open(registry.path).versions()
    found = ModuleRegistry.reindex(registry.path)
    assert (found.versions, found.aliases, found.problems) == (3, 1, ())
    again = ModuleRegistry.open(registry.path)
    assert (again.versions(), again.aliases(), again.history()) == before
    assert again.get("parts").tags == ("spring",)
    # A number is never given twice, not even that of a version that is gone.
    assert again.add(module(registry.path.parent / "e", "e"), facts()).name == "parts#4"
    # Who had it open goes on with the new file.
    assert registry.get("parts@latest").name == "parts#4"


def test_what_cannot_be_taken_in_is_told(registry: ModuleRegistry) -> None:
    one, two, bolts = (registry.folder(registry.get(r)) for r in ("parts#1", "parts#2", "bolts#1"))
    (one / "version.json").write_text("{", encoding="utf-8")
    (two / "adapter_model.safetensors").write_bytes(b"changed")
    (registry.path / "aliases.json").write_text('{"format": 1, "aliases": 7}', encoding="utf-8")
    found = ModuleRegistry.reindex(registry.path)
    assert (found.versions, found.aliases) == (1, 0)
    told = " ".join(found.problems)
    for word in (one.name[:60], two.name[:60], "promote the versions", "restore the folder"):
        assert word in told
    assert [v.name for v in registry.versions()] == ["bolts#1"]
    assert bolts.is_dir()
    assert one.is_dir()
    assert two.is_dir()
    assert (registry.path / "aliases.json.damaged").is_file()


def test_a_registry_of_a_newer_fedsplit_is_left_alone(registry: ModuleRegistry) -> None:
    path = registry.path / "aliases.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(said | {"format": 2}), encoding="utf-8")
    with pytest.raises(ConfigError, match="format 2"):
        ModuleRegistry.reindex(registry.path)
    assert registry.get("parts").name == "parts#2"


def test_a_folder_without_a_row_is_adopted(registry: ModuleRegistry) -> None:
    """As a power cut leaves it between the files and the database; two have one number then."""
    folder = registry.folder(registry.get("bolts#1"))
    said = json.loads((folder / "version.json").read_text(encoding="utf-8"))
    other = module(registry.path / "files" / "part", "orphan")
    digest = module_digest(other)
    said["versions"][0] |= {"digest": digest, "created": 9e9}
    (other / "version.json").write_text(json.dumps(said), encoding="utf-8")
    other.rename(registry.path / "files" / digest)
    (problem,) = ModuleRegistry.reindex(registry.path).problems
    assert "bolts#2" in problem
    assert registry.get("bolts#2").digest == digest
    assert ModuleRegistry.reindex(registry.path).problems == ()


def test_of_two_promotions_at_once_one_is_refused(registry: ModuleRegistry) -> None:
    """Two processes that both saw parts#2 in use."""
    program = (
        "import sys; from pathlib import Path; from fedsplit.core.errors import RegistryError\n"
        "from fedsplit.registry.registry import ModuleRegistry\n"
        "kept = ModuleRegistry.open(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.readline()\n"
        "try: kept.promote('parts@latest' if sys.argv[2] == 'a' else 'parts#1', by=sys.argv[2], expected=sys.argv[3])\n"
        "except RegistryError as err: sys.exit(str(err))\n"
    )
    registry.add(module(registry.path.parent / "e", "e"), facts())
    now = registry.get("parts").digest
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(registry.path), name, now],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in "ab"
    ]  # fmt: skip
    for process in both:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    told = []
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        told.append(process.communicate(timeout=60)[1])
    assert sorted(process.returncode for process in both) == [0, 1]
    refused = next(text for text in told if text)
    assert "moved meanwhile by" in refused
    assert "nothing was changed" in refused
    assert len(registry.history("parts")) == 3


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


def test_a_full_disk_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=320k") as disk:
        registry = ModuleRegistry.open(disk / "modules", create=True)
        one = registry.add(module(tmp_path / "a", "a"), facts())
        two = registry.add(module(tmp_path / "b", "b"), facts())
        registry.promote(one.name, by="me")
        before = (registry.versions(), registry.aliases())
        with pytest.raises(RegistryError, match=r"No space left.*[Ff]ree some space"):
            registry.add(module(tmp_path / "big", "x" * 400_000), facts())
        assert (registry.versions(), registry.aliases()) == before
        assert {p.name for p in (registry.path / "files").iterdir()} == {one.digest, two.digest}
        fill(disk / "filler")
        for change in (
            lambda: registry.promote(two.name, by="me"),
            lambda: registry.tag(one.name, "word"),
            lambda: registry.export(one.name, disk / "out.zip"),
        ):
            with pytest.raises(RegistryError, match="ree some space"):
                change()
            assert (registry.versions(), registry.aliases()) == before
        assert not (disk / "out.zip").exists()
        (disk / "filler").unlink()
        registry.promote(two.name, by="me")
        assert ModuleRegistry.reindex(registry.path).problems == ()
        assert registry.get("parts").name == two.name
        assert not list(disk.rglob("*.part"))


def test_an_audit_log_that_cannot_be_written_prevents_the_change(tmp_path: Path) -> None:
    told = []

    def audit(what: str, detail: object) -> None:
        told.append(what)
        if what == "module-promoted":
            raise RegistryError("no room for the audit log")

    registry = ModuleRegistry.open(tmp_path / "modules", create=True, audit=audit)
    registry.add(module(tmp_path / "a"), facts())
    with pytest.raises(RegistryError, match="no room"):
        registry.promote("parts#1", by="me")
    assert registry.aliases() == {}
    assert told == ["module-added", "module-promoted"]
