"""Exports: what is written is what is read back, PEFT computes the same with it, and damage is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.errors import BackboneError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import whole_model
from tests.model.kinds import LORA, SPECS, away_from_zero, reference
from tests.model.whole import make_batch
from tests.tiny import CONFIGS

families = pytest.mark.parametrize("family", CONFIGS)
kinds = pytest.mark.parametrize("kind", SPECS)


def logits(backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors) -> torch.Tensor:
    inputs, mask, _ = make_batch(backbone.family.model_type)
    with torch.no_grad():
        return whole_model(backbone, spec, tensors)(inputs, mask)


@pytest.mark.parametrize("kind", [k for k in SPECS if k != "merged"])
def test_a_module_comes_back_as_it_went(kind: str, vit: Backbone, tmp_path: Path) -> None:
    spec = SPECS[kind]
    tensors = away_from_zero(vit, spec)
    module.export(tmp_path / "module", vit, spec, tensors)
    got, values = module.load_exported(tmp_path / "module", vit)
    assert got == spec
    assert values.keys() == tensors.keys()
    assert all(np.array_equal(values[n], tensors[n]) for n in tensors)
    assert torch.equal(logits(vit, got, values), logits(vit, spec, tensors))
    in_peft_format = spec.kind in ("lora", "classifier")
    assert (tmp_path / "module" / "adapter_config.json").exists() == in_peft_format


@families
def test_merged_deltas_are_folded_into_lora(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    backbone, spec = Backbone.find(str(tiny[family])), SPECS["merged"]
    tensors = away_from_zero(backbone, spec)
    module.export(tmp_path, backbone, spec, tensors)
    got, values = module.load_exported(tmp_path, backbone)
    assert (got.merged, got.scale) == (False, 1.0)
    assert got.rank <= 24
    before = logits(backbone, spec, tensors)
    torch.testing.assert_close(logits(backbone, got, values), before)
    # And in PEFT, from the file as it was written.
    inputs, _, _ = make_batch(family)
    peft = reference(backbone, got, values, tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(peft(inputs), before)


def test_folding_keeps_the_product_and_finds_the_rank(vit: Backbone) -> None:
    spec = replace(SPECS["merged"], rank=2, max_rank=2)
    tensors = away_from_zero(vit, spec)
    rng = np.random.default_rng(0)
    for name in tensors:
        if ".lora_merged." in name:
            low = rng.standard_normal((24, 3)) @ rng.standard_normal((3, 24))
            tensors[name] = low.astype("f4")
    folded, values = module.fold_merged(spec, tensors)
    assert (folded.rank, folded.max_rank, folded.alpha) == (5, 5, 5)
    for name in [n for n in tensors if ".lora_merged." in n]:
        a, b = (name.replace("lora_merged", part) for part in ("lora_A", "lora_B"))
        want = tensors[name] + spec.scale * tensors[b] @ tensors[a]
        np.testing.assert_allclose(
            values[b] @ values[a], want, rtol=0, atol=2e-6 * np.abs(want).max()
        )


def test_folding_nothing_gives_a_module(vit: Backbone) -> None:
    spec = SPECS["merged"]
    start = module.initial(vit, spec, seed=0)
    folded, values = module.fold_merged(spec, start)
    assert {n: t.shape for n, t in values.items()} == module.shapes(vit, folded)
    assert torch.equal(logits(vit, folded, values), logits(vit, spec, start))


@families
def test_a_prompt_comes_back_in_every_family(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    backbone, spec = Backbone.find(str(tiny[family])), SPECS["prompt"]
    tensors = away_from_zero(backbone, spec)
    module.export(tmp_path, backbone, spec, tensors)
    got, values = module.load_exported(tmp_path, backbone)
    inputs, _, _ = make_batch(family)
    with torch.no_grad():
        whole = reference(backbone, spec, tensors, tmp_path / "peft")(inputs)
    assert torch.equal(logits(backbone, got, values), whole)


def test_another_backbones_module_is_refused(
    vit: Backbone, tiny: dict[str, Path], tmp_path: Path
) -> None:
    module.export(tmp_path, vit, LORA, away_from_zero(vit, LORA))
    with pytest.raises(BackboneError, match=r"was trained on a backbone with digest .*; use the"):
        module.load_exported(tmp_path, Backbone.find(str(tiny["deit"])))
    assert module.load_exported(tmp_path)[0] == LORA


@pytest.mark.parametrize(
    "change",
    [
        {"module": None},
        {"module": {}},
        {"classes": "abc"},
        {"classes": []},
        {"classes": [1]},
        {"module": {"kind": "prompt"}},
    ],
    ids=str,
)
def test_a_description_that_is_none(change: dict[str, Any], vit: Backbone, tmp_path: Path) -> None:
    module.export(tmp_path, vit, LORA, away_from_zero(vit, LORA))
    about = tmp_path / "fedsplit.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | change))
    with pytest.raises(BackboneError, match=r"cannot be read .*give the module folder of a run"):
        module.load_exported(tmp_path)


@pytest.mark.parametrize("name", ["fedsplit.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff" * 99, b"[" * 99_999])
def test_damaged_files(name: str, content: bytes | None, vit: Backbone, tmp_path: Path) -> None:
    module.export(tmp_path, vit, LORA, away_from_zero(vit, LORA))
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match="cannot be read"):
        module.load_exported(tmp_path)


@pytest.mark.parametrize("bad", [np.full(3, np.nan, "f4"), np.full(3, np.inf, "f4"), np.zeros(3)])
def test_a_module_that_no_training_leaves(bad: Any, vit: Backbone, tmp_path: Path) -> None:
    module.export(tmp_path, vit, LORA, away_from_zero(vit, LORA) | {"classifier.bias": bad})
    with pytest.raises(
        BackboneError, match=r"cannot be read .*classifier.bias is .* finite float32"
    ):
        module.load_exported(tmp_path)


def test_tensors_that_do_not_fit_are_named(vit: Backbone, tmp_path: Path) -> None:
    tensors = away_from_zero(vit, LORA)
    module.export(tmp_path, vit, LORA, tensors | {"classifier.bias": np.zeros(9, "f4")})
    with pytest.raises(BackboneError, match=r"'classifier.bias' is \(9,\), \(4,\) in float32"):
        module.load_exported(tmp_path, vit)
    module.export(tmp_path, vit, LORA, tensors | {"odd": np.zeros(9, "f4")})
    with pytest.raises(BackboneError, match=r"'odd' is \(9,\), nothing in float32"):
        module.load_exported(tmp_path, vit)
