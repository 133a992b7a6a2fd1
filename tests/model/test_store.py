"""A store of parts: exactly what a cut needs, equal to the whole folder, and whole whatever comes or breaks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError
from fedsplit.model import store as store_module
from fedsplit.model.backbone import Backbone
from fedsplit.model.manifest import StoredTensor, read_manifest
from fedsplit.model.module import ModuleSpec
from fedsplit.model.part import Part
from fedsplit.model.partial import tensor_file
from fedsplit.model.split import device_part
from fedsplit.model.store import BackboneStore
from tests.model.copies import add_tokenizer, copy_of
from tests.model.stores import fill
from tests.tiny import CONFIGS

SPEC = ModuleSpec(classes=("a", "b"), kind="classifier")


@pytest.fixture
def store(tmp_path: Path) -> BackboneStore:
    return BackboneStore(tmp_path / "backbones")


def held(part: Part) -> dict[str, torch.Tensor]:
    return {n: p for n, p in part.model.named_parameters() if not p.is_meta}


def assert_exactly_enough(store: BackboneStore, source: Path, cut: Cut) -> None:
    """The store builds the whole folder's part, bit for bit, and holds as many bytes as the part does of the backbone."""
    backbone = Backbone.find(str(fill(store, source, cut)))
    whole = Backbone.find(str(source))
    assert backbone.sha256 == whole.sha256
    mine, theirs = held(device_part(backbone, cut, SPEC)), held(device_part(whole, cut, SPEC))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    frozen = {n: t for n, t in mine.items() if n.split(".")[0] not in backbone.family.classifier}
    needed = store.needed(backbone.manifest, cut)
    assert sum(t.bytes for t in needed) == sum(4 * t.numel() for t in frozen.values())
    stored = {f.name for f in (store.folder / "tensors").iterdir()}
    assert stored == {t.sha256 for t in needed}


@pytest.mark.parametrize("cut", ["0,4", "1,3", "3,4", "2,2"])
@pytest.mark.parametrize("family", CONFIGS)
def test_it_holds_exactly_what_a_cut_needs(
    family: str, cut: str, tiny: dict[str, Path], store: BackboneStore
) -> None:
    assert_exactly_enough(store, tiny[family], Cut.parse(cut))


def test_old_names_on_disk(vit_tiny: Path, store: BackboneStore) -> None:
    assert_exactly_enough(store, vit_tiny, Cut(0, 12))


def test_a_stored_tensor_of_which_pieces_are_wanted(tmp_path: Path, store: BackboneStore) -> None:
    name, model, settings = CONFIGS["dinov2"]
    config = getattr(transformers, name)(**settings, use_swiglu_ffn=True)
    getattr(transformers, model)(config).save_pretrained(tmp_path / "swiglu")
    assert_exactly_enough(store, tmp_path / "swiglu", Cut(1, 4))


def test_cuts_and_backbones_share_tensors(
    tiny: dict[str, Path], tmp_path: Path, store: BackboneStore
) -> None:
    fill(store, tiny["vit"], Cut(1, 4))
    before = store.total_bytes()
    fill(store, tiny["vit"], Cut(0, 4))
    assert store.total_bytes() == before
    other = copy_of(tiny["vit"], tmp_path / "other", layer_norm_eps=1e-6)
    fill(store, other, Cut(1, 4))
    assert 0 < store.total_bytes() - before < 50_000
    assert len(store.backbones()) == 2


def test_a_text_backbone_brings_its_tokenizer(
    tiny: dict[str, Path], tmp_path: Path, store: BackboneStore
) -> None:
    source = add_tokenizer(copy_of(tiny["bert"], tmp_path / "bert"))
    (source / "notes.json").write_text("{}")
    path = fill(store, source, Cut(0, 4))
    assert {f.name for f in path.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json",
    }  # fmt: skip
    assert Backbone.find(str(path)).sha256 == Backbone.find(str(source)).sha256


def test_finding_and_missing(tiny: dict[str, Path], store: BackboneStore) -> None:
    sha256 = Backbone.find(str(tiny["vit"])).sha256
    assert store.find(sha256) is None
    assert store.find("../" + sha256) is None
    with pytest.raises(BackboneError, match=r"it is not here at all; run fedsplit site fetch"):
        store.ready(sha256, Cut(0, 4))
    path = fill(store, tiny["vit"], Cut(0, 4))
    assert (store.find(sha256), store.ready(sha256, Cut(0, 4))) == (path, path)
    with pytest.raises(
        BackboneError, match=r"has not what cut 2,4 needs of backbone .*: blocks 0, 1; run"
    ):
        store.ready(sha256, Cut(2, 4))
    with pytest.raises(ConfigError, match="does not fit the backbone"):
        store.ready(sha256, Cut(2, 5))
    with pytest.raises(BackboneError, match=r"blocks 0 to 3 .*and this cut needs them here"):
        device_part(Backbone.find(str(path)), Cut(4, 4), SPEC)


def test_who_fetches_is_asked_for_what_is_not_here(tiny: dict[str, Path], tmp_path: Path) -> None:
    asked = []

    def fetch(sha256: str, cut: Cut) -> Path:
        asked.append((sha256, cut))
        return fill(store, tiny["vit"], cut)

    store = BackboneStore(tmp_path / "backbones", fetch=fetch)
    sha256 = Backbone.find(str(tiny["vit"])).sha256
    for cut in (Cut(0, 4), Cut(0, 4), Cut(1, 4)):
        device_part(Backbone.find(str(store.ready(sha256, cut))), cut, SPEC)
    assert asked == [(sha256, Cut(0, 4)), (sha256, Cut(1, 4))]


def test_bits_that_a_disk_lost_are_noticed(tiny: dict[str, Path], store: BackboneStore) -> None:
    path, cut = fill(store, tiny["vit"], Cut(0, 4)), Cut(0, 4)
    manifest = read_manifest(path)
    file = tensor_file(store.folder, store.needed(manifest, cut)[0].sha256)
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(BackboneError, match=r"has changed since it came; run fedsplit site fetch"):
        device_part(Backbone.find(str(path)), cut, SPEC)
    assert [t.sha256 for t in store.drop_damaged(manifest)] == [file.name]
    assert len(store.missing(manifest, cut)) == 1


def test_a_small_file_that_changed_is_noticed(tiny: dict[str, Path], store: BackboneStore) -> None:
    path = fill(store, tiny["vit"], Cut(0, 4))
    (path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json is not what its manifest"):
        _ = Backbone.find(str(path)).sha256


# What comes.


def a_tensor(data: bytes = b"\0" * 8, **other: Any) -> StoredTensor:
    import hashlib

    said = {"name": "w", "dtype": "F32", "shape": (len(data) // 4,), "bytes": len(data)}
    return StoredTensor(**said | {"sha256": hashlib.sha256(data).hexdigest()} | other)


@pytest.mark.parametrize("came", [b"", b"\0" * 7, b"\0" * 7 + b"\1", b"\0" * 9, b"\0" * 10**6])
def test_wrong_bytes_leave_nothing(came: bytes, store: BackboneStore) -> None:
    with pytest.raises(BackboneError, match=r"has \d+ bytes and sha256 .* the manifest says 8"):
        store.add_tensor(a_tensor(), [came])
    assert not list((store.folder / "tensors").iterdir())


def test_a_stream_without_end_is_left(store: BackboneStore) -> None:
    def endless() -> Any:
        while True:
            yield b"\0" * 5

    with pytest.raises(BackboneError, match="has 9 bytes"):
        store.add_tensor(a_tensor(), endless())


def test_empty_tensors(store: BackboneStore) -> None:
    assert store.add_tensor(a_tensor(b""), []).stat().st_size == 0


def test_wrong_small_files_leave_nothing(tiny: dict[str, Path], store: BackboneStore) -> None:
    manifest = Backbone.find(str(tiny["vit"])).manifest
    for files in ({}, {"config.json": b"{}"}, {"config.json": b"{}", "x.py": b""}):
        with pytest.raises(BackboneError):
            store.add_backbone(manifest, files)
    assert not store.backbones()
    assert not list(store.folder.glob("*.part"))


def test_a_full_disk(
    tiny: dict[str, Path], store: BackboneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(BackboneError, match=r"No space left on device.*free some space"):
        fill(store, tiny["vit"], None)
    with pytest.raises(BackboneError, match=r"No space left on device.*free some space"):
        store.add_tensor(a_tensor(), [b"\0" * 8])
    assert store.total_bytes() == 0


def test_two_at_once(tiny: dict[str, Path], store: BackboneStore) -> None:
    faults: list[BaseException] = []

    def add() -> None:
        try:
            for _ in range(5):
                fill(BackboneStore(store.folder), tiny["vit"], Cut(0, 4))
        except BaseException as err:  # noqa: BLE001
            faults.append(err)

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert not list(store.folder.rglob("*.part"))
    assert_exactly_enough(store, tiny["vit"], Cut(0, 4))


def test_prune_keeps_what_is_shared(
    tiny: dict[str, Path], tmp_path: Path, store: BackboneStore
) -> None:
    kept = fill(store, tiny["vit"], Cut(0, 4))
    other = copy_of(tiny["vit"], tmp_path / "other", layer_norm_eps=1e-6)
    fill(store, other, Cut(2, 4))
    fill(store, tiny["deit"], Cut(0, 4))
    (store.folder / "tensors" / f"{'a' * 64}.part").write_bytes(b"half")
    assert store.prune({kept.name}) > 0
    assert store.backbones() == [kept]
    device_part(Backbone.find(str(kept)), Cut(2, 4), SPEC)
    assert not list(store.folder.rglob("*.part"))
    assert store.prune(()) > 0
    assert [f.name for f in store.folder.rglob("*") if f.is_file()] in ([".lock"], [])
