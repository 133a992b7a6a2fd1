"""The module: where it starts, who trains which of its tensors, and that PEFT itself reads what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel, device_part, server_part
from tests.model.kinds import CLASSES, LORA, away_from_zero
from tests.model.whole import make_batch
from tests.tiny import CONFIGS

BARE = ModuleSpec(classes=CLASSES, kind="classifier")
ALL_CUTS = [Cut(a, b) for a in range(5) for b in range(a, 5)]
families = pytest.mark.parametrize("family", CONFIGS)


def split_logits(backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors, cut: Cut) -> Any:
    device, server = device_part(backbone, cut, spec), server_part(backbone, spec)
    module.load(device, tensors)
    module.load(server, tensors)
    inputs, mask, _ = make_batch(backbone.family.model_type)
    with torch.no_grad():
        return SplitModel(device, cut, LocalEncoder(server, cut))(inputs, mask)


def whole_logits(backbone: Backbone, folder: Path) -> Any:
    """transformers' model with the module put on by PEFT: no fedsplit code in its forward."""
    model_class = getattr(transformers, backbone.family.model_class)
    whole = model_class.from_pretrained(backbone.path, num_labels=len(CLASSES))
    model = PeftModel.from_pretrained(whole, folder).eval()
    inputs, _, _ = make_batch(backbone.family.model_type)
    with torch.no_grad():
        return model(**inputs).logits


# Names, shapes and the start.


@families
def test_shapes_are_those_that_peft_makes_on_the_whole_model(
    family: str, tiny: dict[str, Path]
) -> None:
    backbone = Backbone.find(str(tiny[family]))
    config = LoraConfig(
        r=LORA.rank,
        target_modules=list(backbone.family.lora_targets),
        modules_to_save=list(backbone.family.classifier),
    )
    peft = get_peft_model(backbone.skeleton(len(CLASSES)), config)
    trained = {
        n.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): tuple(p.shape)
        for n, p in peft.named_parameters()
        if p.requires_grad
    }
    assert module.shapes(backbone, LORA) == trained
    bare = module.shapes(backbone, BARE)
    assert bare == {n: s for n, s in trained.items() if ".lora_" not in n}
    assert {n.split(".")[0] for n in bare} == set(backbone.family.classifier)


def test_the_start_is_the_same_on_every_machine_and_differs_by_seed(vit: Backbone) -> None:
    first, again, other = (module.initial(vit, LORA, seed=s) for s in (0, 0, 1))
    assert all(np.array_equal(first[n], again[n]) for n in first)
    moved = {n for n in first if not np.array_equal(first[n], other[n])}
    assert moved == {n for n in first if ".lora_A." in n}
    # No two tensors draw the same numbers.
    assert len({first[n].tobytes() for n in moved}) == len(moved)


@families
def test_the_start_adds_nothing(family: str, tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny[family]))
    start = module.initial(backbone, LORA, seed=3)
    assert {n: t.shape for n, t in start.items()} == module.shapes(backbone, LORA)
    assert {t.dtype for t in start.values()} == {np.dtype("f4")}
    assert all(not t.any() for n, t in start.items() if ".lora_B." in n)
    assert all(t.any() for n, t in start.items() if ".lora_A." in n)
    logits = split_logits(backbone, LORA, start, Cut(1, 3))
    assert torch.equal(logits, torch.zeros(5, len(LORA.classes)))


def test_a_start_without_lora_is_the_same_classifier(tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny["distilbert"]))
    bare, lora = (module.initial(backbone, spec, seed=2) for spec in (BARE, LORA))
    assert all(np.array_equal(bare[n], lora[n]) for n in bare)
    assert bare["pre_classifier.weight"].any()


def test_the_start_on_a_device_does_not_depend_on_its_cut(vit: Backbone) -> None:
    start = module.initial(vit, LORA, seed=0)
    for cut in ALL_CUTS:
        part = device_part(vit, cut, LORA)
        module.load(part, start)
        held = module.read(part)
        assert all(np.array_equal(held[n], start[n]) for n in held)


# Who trains what.


@pytest.mark.parametrize("spec", [LORA, BARE], ids=["lora", "classifier"])
@families
def test_names_over_all_cuts(family: str, spec: ModuleSpec, tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny[family]))
    whole = set(module.shapes(backbone, spec))
    classifier = {n for n in whole if ".lora_" not in n}
    server = module.server_names(backbone, spec)
    assert server | classifier == whole
    assert not server & classifier
    for cut in ALL_CUTS:
        device = module.device_names(backbone, spec, cut)
        both = module.trained_names(backbone, spec, cut, head=True)
        tail = module.trained_names(backbone, spec, cut, head=False)
        assert classifier <= tail <= both == device <= whole
        # With the host's LoRA a device lacks nothing, and what it does not hold runs on the server.
        assert device | server == whole
        away = {blocks_of(backbone, n) for n in whole - device}
        assert away == (set(cut.server_blocks()) if spec.lora else set())
        head = {blocks_of(backbone, n) for n in both - tail}
        assert head == (set(range(cut.a)) if spec.lora else set())


def blocks_of(backbone: Backbone, name: str) -> int:
    return int(name.removeprefix(f"{backbone.family.base}.{backbone.family.blocks}.").split(".")[0])


@pytest.mark.parametrize("cut", ALL_CUTS, ids=str)
def test_names_are_those_of_the_parameters(cut: Cut, vit: Backbone) -> None:
    part = device_part(vit, cut, LORA)
    assert module.parameters(part).keys() == module.device_names(vit, LORA, cut)
    assert all(p.requires_grad for p in module.parameters(part).values())
    module.freeze_head(part, cut.a)
    trained = {n for n, p in module.parameters(part).items() if p.requires_grad}
    assert trained == module.trained_names(vit, LORA, cut, head=False)


def test_block_10_is_not_block_1(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=12, num_attention_heads=1, intermediate_size=4,
        image_size=4, patch_size=4,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    backbone = Backbone.find(str(tmp_path))
    names = module.trained_names(backbone, LORA, Cut(2, 12), head=True)
    assert {blocks_of(backbone, n) for n in names if ".lora_" in n} == {0, 1}
    part = device_part(backbone, Cut(2, 12), LORA)
    assert module.parameters(part).keys() == names


def test_the_server_holds_the_module_of_all_blocks(vit: Backbone) -> None:
    part = server_part(vit, LORA)
    assert module.parameters(part).keys() == module.server_names(vit, LORA)


# Loading and LoRA's targets.


def test_load_and_read_are_copies(vit: Backbone) -> None:
    tensors = away_from_zero(vit, LORA)
    part = device_part(vit, Cut(1, 3), LORA)
    module.load(part, tensors)
    before = module.read(part)
    for tensor in tensors.values():
        tensor += 1
    after = module.read(part)
    assert all(np.array_equal(before[n], after[n]) for n in before)
    after["classifier.bias"][:] = 9
    assert not np.array_equal(module.read(part)["classifier.bias"], after["classifier.bias"])


def test_load_takes_read_only_arrays(vit: Backbone) -> None:
    tensors = {
        n: np.frombuffer(t.tobytes(), "f4").reshape(t.shape)
        for n, t in away_from_zero(vit, LORA).items()
    }
    part = device_part(vit, Cut(1, 3), LORA)
    module.load(part, tensors)
    assert all(np.array_equal(v, tensors[n]) for n, v in module.read(part).items())


def test_load_names_what_lacks_or_does_not_fit(vit: Backbone) -> None:
    tensors = away_from_zero(vit, LORA)
    part = device_part(vit, Cut(1, 3), LORA)
    name = "vit.layers.0.attention.q_proj.lora_A.weight"
    for odd, said in [({}, "got nothing"), ({name: tensors[name][:2]}, r"got \(2, 24\)")]:
        given_ = {n: t for n, t in tensors.items() if n != name} | odd
        with pytest.raises(BackboneError, match=rf"{name}: \(3, 24\) is wanted, {said}; .*rank"):
            module.load(part, given_)
    # Broadcasting would hide a classifier for one class.
    with pytest.raises(BackboneError, match=r"classifier\.bias: \(4,\) is wanted, got \(1,\)"):
        module.load(part, tensors | {"classifier.bias": np.zeros(1, "f4")})


@pytest.mark.parametrize("targets", [("bogus",), ("q_proj", "bogus"), ("attention",), ("",)])
def test_a_bad_target_lists_what_is_offered(targets: tuple[str, ...], vit: Backbone) -> None:
    spec = ModuleSpec(classes=CLASSES, targets=targets)
    for call in (
        lambda: module.shapes(vit, spec),
        lambda: module.initial(vit, spec, seed=0),
        lambda: device_part(vit, Cut(1, 3), spec),
        lambda: server_part(vit, spec),
    ):
        with pytest.raises(ConfigError, match=r"lora-targets: no linear layer .*'vit'") as caught:
            call()
        assert repr(targets[-1]) in str(caught.value)
        offered = str(caught.value).split("there are ")[1].split(", or all-linear")[0].split(", ")
        assert set(offered) == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}


def test_what_is_offered_is_accepted(tiny: dict[str, Path]) -> None:
    for family in CONFIGS:
        backbone = Backbone.find(str(tiny[family]))
        with pytest.raises(ConfigError) as caught:
            module.shapes(backbone, ModuleSpec(classes=CLASSES, targets=("bogus",)))
        offered = tuple(
            str(caught.value).split("there are ")[1].split(", or all-linear")[0].split(", ")
        )
        spec = ModuleSpec(classes=CLASSES, targets=offered)
        part = device_part(backbone, Cut(4, 4), spec)
        assert module.parameters(part).keys() == module.shapes(backbone, spec).keys()
        every = ModuleSpec(classes=CLASSES, targets=("all-linear",))
        assert module.shapes(backbone, every) == module.shapes(backbone, spec)


def test_a_spec_is_read_from_the_settings() -> None:
    config = RunConfig.from_flat(
        {"module": "lora", "lora-rank": 4, "lora-alpha": 9, "lora-targets": " q_proj, ,fc1"}
    )
    assert ModuleSpec.of(config.module, CLASSES) == ModuleSpec(
        classes=CLASSES, rank=4, alpha=9, targets=("q_proj", "fc1")
    )
    for kind in ("classifier", "prompt", "adapter", "full"):
        assert ModuleSpec.of(RunConfig.from_flat({"module": kind}).module, CLASSES).kind == kind


# What PEFT reads.


@pytest.mark.parametrize("spec", [LORA, BARE], ids=["lora", "classifier"])
@families
def test_an_export_gives_the_same_logits_in_peft(
    family: str, spec: ModuleSpec, tiny: dict[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.find(str(tiny[family]))
    tensors = away_from_zero(backbone, spec)
    module.export(tmp_path, backbone, spec, tensors)
    split = split_logits(backbone, spec, tensors, Cut(1, 3))
    assert len(torch.unique(split)) > 1
    assert torch.equal(split, whole_logits(backbone, tmp_path))


@pytest.mark.parametrize(("family", "target"), [("bert", "dense"), ("roberta", "dense")])
def test_targets_that_occur_outside_the_blocks_too(
    family: str, target: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    """Pooler and classifier have a "dense" of their own, which is no target of ours."""
    backbone = Backbone.find(str(tiny[family]))
    spec = ModuleSpec(classes=CLASSES, rank=2, alpha=4, targets=(target,))
    tensors = away_from_zero(backbone, spec)
    module.export(tmp_path, backbone, spec, tensors)
    split = split_logits(backbone, spec, tensors, Cut(1, 3))
    assert torch.equal(split, whole_logits(backbone, tmp_path))


def test_an_export_says_what_it_is(vit: Backbone, tmp_path: Path) -> None:
    module.export(tmp_path / "a" / "b", vit, LORA, away_from_zero(vit, LORA))
    folder = tmp_path / "a" / "b"
    about = json.loads((folder / "fedsplit.json").read_text())
    inputs = about.pop("inputs")
    assert (inputs["kind"], inputs["resize"], inputs["dtype"]) == ("image", [16, 16], "float32")
    assert about == {
        "classes": list(CLASSES),
        "backbone_sha256": vit.sha256,
        "backbone": {"name": vit.path.name, "model_type": "vit"},
        "module": {
            "kind": "lora", "rank": 3, "max_rank": 3, "alpha": 6, "targets": [], "merged": False,
            "prompt_tokens": 8, "deep_prompt": False, "adapter_width": 16, "last_blocks": 0,
        },
    }  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["base_model_name_or_path"] == vit.name
    assert config["inference_mode"] is True
    # A second export over the first: a resumed run does that.
    module.export(folder, vit, LORA, away_from_zero(vit, LORA))
