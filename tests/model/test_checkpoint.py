"""Backbones on disk: found or refused with a reason, and read tensor by tensor as transformers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model.backbone import Backbone
from fedsplit.model.checkpoint import load_tensors
from fedsplit.model.families import FAMILIES
from fedsplit.model.files import INDEX, SINGLE, find_backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import device_part
from tests.tiny import CONFIGS

SPEC = ModuleSpec(classes=("a", "b"))


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny backbone that a test may damage; `config` overrides keys of its config.json."""

    def make(family: str = "vit", **config: Any) -> Path:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny[family], folder)
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything that the whole model keeps below its classifier, read by fedsplit."""
    backbone = Backbone.find(str(path))
    skeleton = backbone.skeleton(2)
    names = {n for n, _ in skeleton.named_parameters() if n.split(".")[0] == backbone.family.base}
    return load_tensors(backbone.path, skeleton, names)


def transformers_own(path: Path) -> dict[str, torch.Tensor]:
    """The same, loaded by transformers' own classification model."""
    family = FAMILIES[json.loads((path / "config.json").read_text())["model_type"]]
    model = getattr(transformers, family.model_class).from_pretrained(path, dtype=torch.float32)
    return {n: p for n, p in model.named_parameters() if n.split(".")[0] == family.base}


def assert_equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert mine
    different = [n for n in mine if not torch.equal(mine[n], theirs[n])]
    assert not different
    assert {t.dtype for t in mine.values()} == {torch.float32}


# Finding one.


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nowhere", "../nowhere", "nowhere", "a/b/c", "~nobody-here/x"]
)
def test_what_is_no_directory_is_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=r"give a directory") as caught:
        find_backbone(name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a/" + "b" * 5000, "nul\0x"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(BackboneError):
        find_backbone(name)


def test_a_hub_id_without_a_hub_says_so() -> None:
    with pytest.raises(BackboneError, match=r"'nobody/no-model' .*model hub.*check the name and"):
        find_backbone("nobody/no-model")
    with pytest.raises(BackboneError, match="HFValidationError"):
        find_backbone("no body/no model")


def test_the_bundled_one_is_found_by_name() -> None:
    path = find_backbone("vit-glyphs")
    assert (path / SINGLE).is_file()
    assert Backbone.find("vit-glyphs").family.model_type == "vit"


def test_a_directory_wins_and_is_absolute(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny["vit"].parent)
    assert find_backbone("vit") == tiny["vit"].resolve()


def test_a_directory_without_weights(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / SINGLE).unlink()
    with pytest.raises(BackboneError, match=rf"has no weights: {SINGLE} or {INDEX} is wanted"):
        Backbone.find(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BackboneError, match=r"save_pretrained\(\.\.\., safe_serialization=True"):
        Backbone.find(str(folder))


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "3", "null", '"vit"', "{}", '{"model_type": ["vit"]}', "[" * 99999],
)
def test_a_config_that_is_none(text: str | None, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=r"has no usable config\.json") as caught:
        Backbone.find(str(folder))
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "x"), ("num_hidden_layers", None)])
def test_a_config_with_a_value_of_the_wrong_type(
    key: str, value: object, copy: Callable[..., Path]
) -> None:
    with pytest.raises(BackboneError, match=rf"has no usable config\.json .*{key}"):
        Backbone.find(str(copy(**{key: value})))


@pytest.mark.parametrize(("key", "value"), [("patch_size", 0), ("hidden_act", "nope")])
def test_a_config_of_which_no_model_can_be_made(
    key: str, value: object, copy: Callable[..., Path]
) -> None:
    backbone = Backbone.find(str(copy(**{key: value})))
    with pytest.raises(BackboneError, match="no ViTForImageClassification can be made"):
        backbone.skeleton(2)


def test_an_unknown_family_lists_the_known_ones(copy: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError, match="'gpt2', which fedsplit does not know") as caught:
        Backbone.find(str(copy(model_type="gpt2")))
    assert all(family in str(caught.value) for family in CONFIGS)
    assert set(CONFIGS) == set(FAMILIES)


# Reading one.


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_the_one_that_transformers_loads(
    family: str, tiny: dict[str, Path]
) -> None:
    assert_equal(all_tensors(tiny[family]), transformers_own(tiny[family]))


def test_old_names_on_disk(vit_tiny: Path) -> None:
    assert_equal(all_tensors(vit_tiny), transformers_own(vit_tiny))
    on_disk = load_file(vit_tiny / SINGLE)
    assert not on_disk.keys() >= all_tensors(vit_tiny).keys()


def test_a_real_text_backbone(minilm: Path) -> None:
    mine = all_tensors(minilm)
    theirs = transformers_own(minilm)
    assert_equal(mine, theirs)


def shard(source: Path, target: Path) -> Path:
    """The same backbone in several files, by transformers itself."""
    model = transformers.AutoModel.from_pretrained(source)
    model.save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


def test_shards_load_like_one_file(tiny: dict[str, Path], tmp_path: Path) -> None:
    sharded = shard(tiny["vit"], tmp_path / "sharded")
    assert not (sharded / SINGLE).exists()
    one, many = all_tensors(tiny["vit"]), all_tensors(sharded)
    assert_equal(many, one)


def test_a_missing_shard_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    sharded = shard(tiny["vit"], tmp_path / "sharded")
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BackboneError, match=rf"{INDEX} names \['{lost.name}'\], which are not"):
        Backbone.find(str(sharded))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_a_damaged_index(text: str, copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(BackboneError, match=rf"{INDEX} cannot be read"):
        Backbone.find(str(folder))


def test_an_index_cannot_name_files_elsewhere(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    (folder / SINGLE).rename(tmp_path / "elsewhere.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    with pytest.raises(BackboneError, match=r"names \['elsewhere\.safetensors'\], which are not"):
        Backbone.find(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(dtype: torch.dtype, copy: Callable[..., Path]) -> None:
    folder = copy()
    stored = {n: t.to(dtype) for n, t in load_file(folder / SINGLE).items()}
    save_file(stored, folder / SINGLE, metadata={"format": "pt"})
    assert_equal(all_tensors(folder), transformers_own(folder))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_weights_are_refused(keep: float, copy: Callable[..., Path]) -> None:
    folder = copy()
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(BackboneError, match=r"weights cannot be read .*copy the files again"):
        all_tensors(folder)


def test_missing_tensors_are_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    stored = load_file(folder / SINGLE)
    lost = [n for n in stored if ".2." in n and n.endswith("bias")]
    assert lost
    save_file({n: t for n, t in stored.items() if n not in lost}, folder / SINGLE)
    with pytest.raises(BackboneError, match=rf"lacks {len(lost)} tensors .*vit\.layers\.2\."):
        all_tensors(folder)
    # A device that does not run that block does not miss them.
    device_part(Backbone.find(str(folder)), Cut(2, 3), SPEC)


def test_weights_of_another_size(copy: Callable[..., Path]) -> None:
    with pytest.raises(BackboneError, match=r"has shape .*24.*, config\.json wants .*48"):
        all_tensors(copy(hidden_size=48))
    with pytest.raises(BackboneError, match=r"lacks \d+ tensors .*layers\.4"):
        all_tensors(copy(num_hidden_layers=6))


def test_only_what_is_wanted_is_read(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.find(str(tiny["vit"]))
    skeleton = backbone.skeleton(2)
    name = "vit.layers.2.attention.q_proj.weight"
    found = load_tensors(backbone.path, skeleton, {name})
    assert list(found) == [name]
    assert all(p.is_meta for p in skeleton.parameters())

    read: list[str] = []
    real = torch.Tensor.to

    def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("copy"):
            read.append(str(tuple(tensor.shape)))
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    part = device_part(backbone, Cut(1, 4), SPEC)
    held = {n for n, p in part.model.named_parameters() if not p.is_meta and ".lora_" not in n}
    from_disk = {n for n in held if not n.startswith("classifier.")}
    assert len(read) == len(from_disk)
    assert all(n.startswith(("vit.embeddings.", "vit.layers.0.")) for n in from_disk)


def test_what_is_read_does_not_lean_on_the_file(copy: Callable[..., Path]) -> None:
    folder = copy()
    tensors = all_tensors(folder)
    before = {n: t.clone() for n, t in tensors.items()}
    size = (folder / SINGLE).stat().st_size
    (folder / SINGLE).write_bytes(b"\0" * size)
    assert all(torch.equal(before[n], t) for n, t in tensors.items())


def test_what_older_exports_keep_in_one_tensor_is_cut(tmp_path: Path) -> None:
    """DINOv2's giant has SwiGLU: its first layer is one tensor on disk and two in memory."""
    name, model, settings = CONFIGS["dinov2"]
    config = getattr(transformers, name)(**settings, use_swiglu_ffn=True)
    getattr(transformers, model)(config).save_pretrained(tmp_path)
    assert any("weights_in" in n for n in load_file(tmp_path / SINGLE))
    assert_equal(all_tensors(tmp_path), transformers_own(tmp_path))


# What a backbone says of itself.


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes(family: str, tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny[family]))
    assert (backbone.blocks, backbone.width) == (4, 24)
    assert backbone.pooled_width == (48 if family == "dinov2" else 24)
    # 16 patches and the class token; DeiT has a distillation token too.
    wanted = 18 if backbone.family.kind == "image" else 30
    assert backbone.max_tokens(0, 30) == wanted
    whole = sum(p.numel() for p in backbone.skeleton(1).parameters())
    assert backbone.weight_bytes() == 4 * whole


def test_sizes_given_as_pairs(copy: Callable[..., Path]) -> None:
    backbone = Backbone.find(str(copy(image_size=[16, 8], patch_size=[4, 4])))
    assert backbone.max_tokens(0, 0) == 4 * 2 + 2
    assert backbone.max_tokens(32, 0) == 8 * 8 + 2
