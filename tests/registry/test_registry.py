"""The registry of modules: versions by content, aliases that move at once, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedsplit.core.errors import ConfigError, RegistryError
from fedsplit.registry.module_files import module_digest
from fedsplit.registry.registry import ModuleRegistry, find_registry
from tests.registry.modules import facts, module


@pytest.fixture
def registry(tmp_path: Path) -> ModuleRegistry:
    return ModuleRegistry.open(tmp_path / "modules", create=True)


def test_versions_are_known_by_content(registry: ModuleRegistry, tmp_path: Path) -> None:
    first = registry.add(module(tmp_path / "a"), facts(run="monday"))
    again = registry.add(module(tmp_path / "b"), facts(run="tuesday"))
    other = registry.add(module(tmp_path / "c", "better"), facts(run="wednesday"))
    assert first.digest == again.digest == module_digest(tmp_path / "b")
    assert [run.name for run in again.runs] == ["monday", "tuesday"]
    assert [v.name for v in registry.versions()] == ["parts#1", "parts#2"]
    assert (first.classes, first.backbone, first.target) == (("ng", "ok"), "vit-glyphs", "class")
    for reference in ("parts#2", "parts@latest", other.digest, other.digest[:8].upper()):
        assert registry.get(reference).digest == other.digest
    kept = registry.folder(other)
    assert (kept / "adapter_model.safetensors").read_text() == "better"
    assert module_digest(kept) == other.digest
    assert set(registry.files(other)) == {"adapter_model.safetensors", "fedsplit.json"}


def test_a_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    folder = module(tmp_path / "m")
    lines = "".join(
        f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted(folder.iterdir())
    )
    assert module_digest(folder) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_same_files_may_be_of_two_tasks(registry: ModuleRegistry, tmp_path: Path) -> None:
    folder = module(tmp_path / "m")
    a, b = (registry.add(folder, facts(task=task)) for task in ("a", "b"))
    registry.promote("a#1", by="me")
    assert registry.get("a").name == "a#1"
    assert registry.get("b#1").aliases == ()
    with pytest.raises(ConfigError, match="a#1, b#1"):
        registry.get(a.digest)
    registry.remove("b#1")
    assert registry.get(b.digest).name == "a#1"
    assert registry.files(a)


def test_aliases_move_and_go_back(registry: ModuleRegistry, tmp_path: Path) -> None:
    one, two, three = (
        registry.add(module(tmp_path / name, name), facts(run=name)) for name in "abc"
    )
    for version in (one, two, three):
        moved = registry.promote(version.name, by="Sato", why="better")
    assert (moved.digest, moved.previous) == (three.digest, two.digest)
    assert registry.rollback("parts", by="Sato").digest == two.digest
    assert registry.get("parts").name == "parts#2"
    assert registry.rollback("parts", by="Sato").digest == one.digest
    with pytest.raises(ConfigError, match="nothing to go back to"):
        registry.rollback("parts", by="Sato")
    registry.promote("parts#3", by="Ito")
    assert registry.rollback("parts", by="Ito").digest == one.digest
    assert [p.kind for p in registry.history("parts")].count("rollback") == 3
    assert registry.aliases() == {"parts": {"production": one.digest}}


def test_what_names_no_version_is_refused_with_what_there_is(
    registry: ModuleRegistry, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="each run adds one"):
        registry.get("parts")
    registry.add(module(tmp_path / "a"), facts())
    for reference, told in (
        ("parts", "module promote parts#1"),
        ("parts#7", "numbers 1 to 1"),
        ("other", "tasks are: parts"),
        ("a/b", "names no module"),
        ("parts@nothing", "aliases"),
        ("deadbeef", "no module"),
    ):
        with pytest.raises(ConfigError, match=told):
            registry.get(reference)


def test_files_that_were_changed_are_never_promoted(
    registry: ModuleRegistry, tmp_path: Path
) -> None:
    version = registry.add(module(tmp_path / "a"), facts())
    (registry.folder(version) / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(RegistryError, match="were changed"):
        registry.promote("parts#1", by="me")
    assert registry.aliases() == {}
    # The run's own copy heals it.
    registry.add(tmp_path / "a", facts())
    registry.promote("parts#1", by="me")


def test_a_registry_is_found_near_a_folder(tmp_path: Path) -> None:
    assert find_registry(tmp_path) is None
    with pytest.raises(ConfigError, match="no registry of modules"):
        ModuleRegistry.open(tmp_path)
    for place in (tmp_path / "runs" / "modules", tmp_path / "modules", tmp_path):
        ModuleRegistry.open(place, create=True)
        assert find_registry(tmp_path) == place
