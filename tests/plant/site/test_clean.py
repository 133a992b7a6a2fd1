"""What a site keeps is listed and bounded; what decides which samples test stays for good."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.core.cut import Cut
from fedsplit.model.store import BackboneStore
from fedsplit.plant.site.clean import keep_bounded, kept, remove
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.join import Joined

from ...model.stores import fill


@pytest.fixture
def folder(joined: Callable[..., Joined]) -> SiteFolder:
    found = joined().folder
    toml = found.path / "site.toml"
    text = toml.read_text(encoding="utf-8").replace("runs = 50", "runs = 2")
    toml.write_text(text.replace("log-mb = 20", "log-mb = 1"), encoding="utf-8")
    return SiteFolder.at(found.path)


def a_file(path: Path, size: int, *, days_old: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    when = time.time() - days_old * 86400
    os.utime(path, (when, when))
    return path


def test_old_runs_and_logs_go_and_sides_stay(folder: SiteFolder) -> None:
    runs = [a_file(folder.kept / f"{i}.safetensors", 10, days_old=i) for i in range(4)]
    lists = [a_file(folder.kept / f"s-{i}.list.npz", 10, days_old=i) for i in range(3)]
    sides = a_file(folder.kept / "s.sides.npz", 10, days_old=900)
    logs = [a_file(folder.logs / "runtime.jsonl", 600_000)]
    logs += [a_file(folder.logs / f"runtime.jsonl.{i}", 600_000, days_old=i) for i in (1, 2)]
    part = a_file(folder.path / ".site.toml.ab.part", 5, days_old=2)
    fresh = a_file(folder.path / ".site.toml.cd.part", 5)
    found = kept(folder)
    assert sum(one.bytes for one in found) == 7 * 10 + 10 + 1_800_000 + 5
    told: list[str] = []
    keep_bounded(folder, told.append)
    assert [p.exists() for p in runs] == [True, True, False, False]
    assert [p.exists() for p in lists] == [True, True, False]
    assert [p.exists() for p in logs] == [True, False, False]
    assert sides.exists()
    assert fresh.exists()
    assert not part.exists()
    assert told == ["6 old files were removed by the retention settings (1.2 MB)"]
    keep_bounded(folder, told.append)
    assert len(told) == 1


def test_what_cannot_be_removed_is_named(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        a_file(folder.kept / f"{i}.safetensors", 10, days_old=i)

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    freed, faults = remove(folder, kept(folder))
    assert freed == 0
    assert len(faults) == 1
    assert "2.safetensors cannot be removed (Permission denied)" in faults[0]


def test_backbones_that_are_no_longer_in_use(folder: SiteFolder, tiny: dict[str, Path]) -> None:
    store = BackboneStore(folder.backbones)
    old, new = (fill(store, tiny[name], Cut(0, 4)) for name in ("vit", "bert"))
    when = time.time() - 86400
    os.utime(old, (when, when))
    before = store.total_bytes()
    found = {one.path: one.goes for one in kept(folder) if one.kind == "backbones"}
    assert found == {old: "no longer in use", new: "", folder.backbones / "tensors": ""}
    freed, faults = remove(folder, kept(folder))
    assert (freed, faults) == (before - store.total_bytes(), [])
    assert freed > 0
    assert store.backbones() == [new]
    # A site that runs does not look at them: that would load torch.
    keep_bounded(folder, lambda _: None)
    remove(folder, kept(folder, all_backbones=True))
    assert store.backbones() == []
    assert not list((folder.backbones / "tensors").iterdir())
