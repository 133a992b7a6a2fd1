"""A manifest: the same for the same tensors however they lie in files, and nothing hostile passes for one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone
from fedsplit.model.files import INDEX, SINGLE, stamp
from fedsplit.model.manifest import DTYPE_BYTES, Manifest, spans, stored_tensors
from tests.model.copies import change_tensors, copy_of

ZEROS = hashlib.sha256(b"\0" * 24).hexdigest()
TENSOR = {"name": "w", "dtype": "F32", "shape": [2, 3], "bytes": 24, "sha256": ZEROS}
FILE = {"name": "config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
GOOD: dict[str, Any] = {"format": 1, "inputs": "0" * 32, "files": [FILE], "tensors": [TENSOR]}


def read(**other: Any) -> Manifest:
    return Manifest.parse(json.dumps(GOOD | other).encode())


def in_shards(source: Path, target: Path) -> Path:
    """The same tensors in three files, out of order."""
    copy_of(source, target)
    tensors = load_file(target / SINGLE)
    names = sorted(tensors, reverse=True)
    where = {}
    for i in range(3):
        save_file({n: tensors[n] for n in names[i::3]}, target / f"part-{i}.safetensors")
        where |= dict.fromkeys(names[i::3], f"part-{i}.safetensors")
    (target / SINGLE).unlink()
    (target / INDEX).write_text(json.dumps({"metadata": {"by": "hand"}, "weight_map": where}))
    return target


def test_how_tensors_lie_in_files_does_not_matter(tiny: dict[str, Path], tmp_path: Path) -> None:
    one = Backbone.find(str(tiny["vit"]))
    many = Backbone.find(str(in_shards(tiny["vit"], tmp_path / "many")))
    assert many.manifest.canonical() == one.manifest.canonical()
    assert many.sha256 == one.sha256


def test_what_it_says_of_a_tensor(tiny: dict[str, Path]) -> None:
    stored = load_file(tiny["vit"] / SINGLE)
    found = stored_tensors(tiny["vit"])
    assert [t.name for t in found] == sorted(stored)
    for tensor, span in zip(found, sorted(spans(tiny["vit"]), key=lambda s: s.name), strict=True):
        data = stored[tensor.name].numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == tensor.sha256
        assert tensor.shape == tuple(stored[tensor.name].shape)
        assert span.file.read_bytes()[span.offset :][: span.bytes] == data


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_any_other_tensor_is_another_digest(
    change: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    source = tiny["vit"]
    folder = copy_of(source, tmp_path / "other")
    before = Backbone.find(str(folder)).sha256
    tensors = load_file(folder / SINGLE)
    name = sorted(tensors)[0]
    tensor = tensors.pop(name)
    tensors[name + "2" if change == "name" else name] = {
        "value": tensor + 1, "name": tensor, "dtype": tensor.view(torch.int32), "shape": tensor.reshape(1, -1),
    }[change]  # fmt: skip
    save_file(tensors, folder / SINGLE)
    # The same Backbone's files have changed under it: nothing stale is told.
    assert Backbone.find(str(folder)).sha256 != before


def test_weights_replaced_in_place_are_noticed(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(tiny["vit"], tmp_path / "copy")
    backbone, before = Backbone.find(str(folder)), stamp(folder)
    sha256, times = backbone.sha256, (folder / SINGLE).stat()
    change_tensors(folder, lambda name, tensor: tensor + 1)
    os.utime(folder / SINGLE, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (folder / SINGLE).stat().st_size == times.st_size
    assert stamp(folder) != before
    assert backbone.sha256 != sha256


def test_two_files_that_contradict_each_other(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = in_shards(tiny["vit"], tmp_path / "many")
    one, other = folder / "part-0.safetensors", folder / "part-1.safetensors"
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(other) | {name: tensor}, other)
    assert len(stored_tensors(folder)) == len(stored_tensors(tiny["vit"]))
    save_file(load_file(other) | {name: tensor + 1}, other)
    with pytest.raises(BackboneError, match=r"two of its files hold a tensor"):
        stored_tensors(folder)


def test_a_manifest_is_read_as_it_was_written(tiny: dict[str, Path]) -> None:
    manifest = Backbone.find(str(tiny["bert"])).manifest
    again = Manifest.parse(manifest.canonical())
    assert again == manifest
    assert again.sha256 == Backbone.find(str(tiny["bert"])).sha256


def test_the_types_are_those_of_safetensors() -> None:
    for dtype, size in DTYPE_BYTES.items():
        assert (
            read(tensors=[TENSOR | {"dtype": dtype, "bytes": 6 * size}]).tensors[0].dtype == dtype
        )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra"),
        ({"inputs": "0" * 64}, "inputs"),
        ({"files": []}, r"config\.json is missing"),
        ({"files": [FILE, FILE]}, "twice"),
        ({"files": [FILE, FILE | {"name": "../../etc/passwd"}]}, "no file that"),
        ({"files": [FILE, FILE | {"name": "modeling.py"}]}, "no file that"),
        ({"files": [FILE | {"bytes": 2**40}]}, r"files\.0\.bytes"),
        ({"tensors": [TENSOR, TENSOR]}, "twice"),
        ({"tensors": [TENSOR | {"name": "x"}, TENSOR]}, "out of order"),
        ({"tensors": [TENSOR | {"name": "a\nb"}]}, "cannot be shown"),
        ({"tensors": [TENSOR | {"name": "x" * 1001}]}, r"tensors\.0\.name"),
        ({"tensors": [TENSOR | {"dtype": "f4,O"}]}, "dtype f4,O is none"),
        ({"tensors": [TENSOR | {"bytes": 23}]}, "23 bytes are not those"),
        ({"tensors": [TENSOR | {"shape": [2**62, 2**62]}]}, "24 bytes are not those"),
        ({"tensors": [TENSOR | {"shape": [2**41], "dtype": "U8", "bytes": 2**41}]}, "bytes"),
        ({"tensors": [TENSOR | {"shape": [-2, -3]}]}, "shape"),
        ({"tensors": [TENSOR | {"shape": [1] * 17, "bytes": 4}]}, "shape"),
        ({"tensors": [TENSOR | {"sha256": "../" + ZEROS[3:]}]}, "sha256"),
    ],
)
def test_a_hostile_one_is_refused(other: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackboneError, match=reason):
        read(**other)


def test_a_huge_one_is_not_looked_at() -> None:
    with pytest.raises(BackboneError, match="at most"):
        Manifest.parse(b" " * (64 * 2**20 + 1))


def parsed_or_refused(text: bytes) -> None:
    try:
        manifest = Manifest.parse(text)
    except BackboneError:
        return
    assert Manifest.parse(manifest.canonical()) == manifest


@given(st.binary(max_size=300))
def test_noise(text: bytes) -> None:
    parsed_or_refused(text)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(
    place=st.sampled_from(["top", "file", "tensor"]),
    key=st.sampled_from(["format", "inputs", "name", "bytes", "sha256", "shape", "dtype", "x"]),
    value=_VALUES,
)
def test_a_value_that_is_none(place: str, key: str, value: Any) -> None:
    said = json.loads(json.dumps(GOOD))
    {"top": said, "file": said["files"][0], "tensor": said["tensors"][0]}[place][key] = value
    parsed_or_refused(json.dumps(said).encode())


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[[], Path]:
    return lambda: copy_of(tiny["vit"], tmp_path / "copy")


def test_a_pointer_and_a_truncated_file_are_refused(copy: Callable[[], Path]) -> None:
    folder = copy()
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-1])
    with pytest.raises(BackboneError, match=r"weights cannot be read .*copy the files again"):
        _ = Backbone.find(str(folder)).sha256
    (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BackboneError, match="git-lfs pointer"):
        Backbone.find(str(folder))
