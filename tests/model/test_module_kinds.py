"""Every kind of module: where it starts, whose tensors are whose, loading, ranks, merged deltas, what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.model.split import SplitModel, device_part, server_part, whole_model
from tests.kept import frozen_weights
from tests.model.kinds import CLASSES, LORA, SPECS, away_from_zero
from tests.model.whole import make_batch
from tests.tiny import CONFIGS

ALL_CUTS = [Cut(a, b) for a in range(5) for b in range(a, 5)]
families = pytest.mark.parametrize("family", CONFIGS)
kinds = pytest.mark.parametrize("kind", SPECS)


def logits(backbone: Backbone, spec: ModuleSpec, tensors: ModuleTensors) -> torch.Tensor:
    inputs, mask, _ = make_batch(backbone.family.model_type)
    with torch.no_grad():
        return whole_model(backbone, spec, tensors)(inputs, mask)


# Names and the start.


@kinds
@pytest.mark.parametrize("family", ["vit", "dinov2", "roberta"])
def test_every_cut_parts_the_module_in_two(family: str, kind: str, tiny: dict[str, Path]) -> None:
    backbone, spec = Backbone.find(str(tiny[family])), SPECS[kind]
    everything = set(module.shapes(backbone, spec))
    top = backbone.blocks + 1
    classifier = {n for n in everything if module.depth(backbone, n) == top}
    assert {n.split(".")[0] for n in classifier} == set(backbone.family.classifier)
    for cut in ALL_CUTS:
        device = module.device_names(backbone, spec, cut)
        server = module.server_names(backbone, spec, cut)
        assert device | server == everything
        assert not device & server
        assert server <= module.server_names(backbone, spec)
        trained = module.trained_names(backbone, spec, cut, head=True)
        assert trained == {n for n in device if ".lora_merged." not in n}
        tail = module.trained_names(backbone, spec, cut, head=False)
        assert {module.depth(backbone, n) < cut.a for n in trained - tail} <= {True}
        assert classifier <= tail
        fixed = module.trained_names(backbone, spec, cut, head=True, classifier=False)
        assert fixed == trained - classifier


@pytest.mark.parametrize("cut", [Cut(0, 4), Cut(1, 3), Cut(2, 2)], ids=str)
@kinds
def test_names_and_shapes_are_those_of_the_parameters(kind: str, cut: Cut, vit: Backbone) -> None:
    spec, weights = SPECS[kind], frozen_weights(vit)
    device = device_part(vit, cut, spec, weights=weights)
    wanted = module.shapes(vit, spec)
    got = {n: tuple(p.shape) for n, p in module.parameters(device).items()}
    assert got == {n: wanted[n] for n in module.device_names(vit, spec, cut)}
    trains = {n for n, p in module.parameters(device).items() if p.requires_grad}
    assert trains == module.trained_names(vit, spec, cut, head=True)
    module.freeze_head(device, cut.a)
    trains = {n for n, p in module.parameters(device).items() if p.requires_grad}
    assert trains == module.trained_names(vit, spec, cut, head=False)
    module.freeze_classifier(device)
    trains = {n for n, p in module.parameters(device).items() if p.requires_grad}
    assert trains == module.trained_names(vit, spec, cut, head=False, classifier=False)
    server = server_part(vit, spec, weights=weights)
    assert module.parameters(server).keys() == module.server_names(vit, spec)
    assert not any(p.requires_grad for p in server.model.parameters())


def test_where_each_kind_lives(vit: Backbone) -> None:
    def depths(kind: str) -> set[int]:
        return {module.depth(vit, n) for n in module.shapes(vit, SPECS[kind])}

    assert depths("lora") == {0, 1, 2, 3, 5}
    assert depths("last blocks") == {2, 3, 5}
    assert depths("last adapters") == {3, 5}
    assert depths("prompt") == {-1, 5}
    assert depths("deep prompt") == {-1, 1, 2, 3, 5}
    assert depths("classifier") == {5}
    assert depths("full") == {-1, 0, 1, 2, 3, 4, 5}
    assert depths("full blocks") == {0, 1, 2, 3, 4, 5}
    assert depths("last full block") == {3, 4, 5}
    # With the pooling on the server, the last norm is the server's.
    assert "vit.layernorm.weight" in module.server_names(vit, SPECS["full"], Cut(1, 4))
    assert "vit.layernorm.weight" in module.device_names(vit, SPECS["full"], Cut(1, 3))


@families
def test_a_full_module_is_the_whole_model_as_on_disk(family: str, tiny: dict[str, Path]) -> None:
    backbone, spec = Backbone.find(str(tiny[family])), SPECS["full"]
    skeleton = backbone.skeleton(len(CLASSES))
    names = {n for n, _ in skeleton.named_parameters()}
    start = module.initial(backbone, spec, seed=0)
    assert names - start.keys() == set(backbone.family.idle)
    assert {n: t.shape for n, t in start.items()} == module.shapes(backbone, spec)
    bare = module.initial(backbone, SPECS["classifier"], seed=0)
    assert all(np.array_equal(start[n], bare[n]) for n in bare)
    # Any classifier on both: the same function.
    head = {n: t + 0.1 for n, t in bare.items()}
    full = logits(backbone, spec, start | head)
    assert torch.equal(full, logits(backbone, SPECS["classifier"], head))


@pytest.mark.parametrize("kind", ["lora", "merged", "adapter", "full"])
@families
def test_the_start_adds_nothing(family: str, kind: str, tiny: dict[str, Path]) -> None:
    backbone = Backbone.find(str(tiny[family]))
    start = module.initial(backbone, SPECS[kind], seed=1)
    assert {t.dtype for t in start.values()} == {np.dtype("f4")}
    bare = {n: t + 0.1 for n, t in module.initial(backbone, SPECS["classifier"], seed=1).items()}
    assert torch.equal(
        logits(backbone, SPECS[kind], start | bare), logits(backbone, SPECS["classifier"], bare)
    )


def test_a_classifiers_first_layers_start_as_the_checkpoint_has_them(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    spec = SPECS["classifier"]
    config = Backbone.find(str(tiny["modernbert"])).config
    masked = transformers.ModernBertForMaskedLM(config)
    masked.save_pretrained(tmp_path / "masked")
    start = module.initial(Backbone.find(str(tmp_path / "masked")), spec, seed=0)
    for name, value in masked.head.state_dict().items():
        assert np.array_equal(start[f"head.{name}"], value.numpy())
    assert not start["classifier.weight"].any()
    # A checkpoint without them: a norm does nothing at first.
    start = module.initial(Backbone.find(str(tiny["modernbert"])), spec, seed=0)
    assert (start["head.norm.weight"] == 1).all()
    assert start["head.dense.weight"].std() > 0


def test_a_prompt_starts_as_vpt_does(vit: Backbone) -> None:
    (name,) = (n for n in module.shapes(vit, SPECS["prompt"]) if ".prompt." in n)
    prompt = module.initial(vit, SPECS["prompt"], seed=0)[name]
    assert name == "vit.prompt.weight"
    limit = np.sqrt(6 / (3 * 4 * 4 + 24))
    assert limit / 2 < np.abs(prompt).max() <= limit
    assert not np.array_equal(prompt, module.initial(vit, SPECS["prompt"], seed=1)[name])


def test_a_deep_prompt_has_tokens_of_its_own_for_each_block(vit: Backbone) -> None:
    start = module.initial(vit, SPECS["deep prompt"], seed=0)
    prompts = {n: t for n, t in start.items() if ".prompt." in n}
    assert {t.shape for t in prompts.values()} == {(3, 24)}
    assert len({t.tobytes() for t in prompts.values()}) == len(prompts) == vit.blocks
    shallow = module.initial(vit, SPECS["prompt"], seed=0)
    assert np.array_equal(prompts["vit.prompt.weight"], shallow["vit.prompt.weight"])


def test_a_deep_prompt_trains_in_the_tail_without_a_gradient_from_the_encoder(
    vit: Backbone,
) -> None:
    spec, cut = SPECS["deep prompt"], Cut(1, 3)
    device, server = device_part(vit, cut, spec), server_part(vit, spec)
    for part in (device, server):
        module.load(part, away_from_zero(vit, spec))
    encoder = LocalEncoder(server, cut)
    model = SplitModel(device, cut, encoder)
    module.freeze_head(device, cut.a)
    inputs, mask, _ = make_batch("vit")
    model(inputs, mask).sum().backward()
    assert encoder.kept_steps == 0
    grads = {n: p.grad for n, p in module.parameters(device).items() if p.requires_grad}
    assert [n for n in grads if ".prompt." in n] == [
        f"{vit.family.base}.{vit.family.blocks}.3.prompt.weight"
    ]
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())


# Values.


@kinds
def test_load_and_read_are_copies(kind: str, vit: Backbone) -> None:
    spec = SPECS[kind]
    tensors = away_from_zero(vit, spec)
    part = device_part(vit, Cut(1, 3), spec, weights=frozen_weights(vit))
    module.load(part, tensors)
    held = module.read(part)
    assert held.keys() == module.device_names(vit, spec, Cut(1, 3))
    assert all(np.array_equal(held[n], tensors[n]) for n in held)
    for tensor in held.values():
        tensor += 1
    assert all(np.array_equal(v, tensors[n]) for n, v in module.read(part).items())
    name = next(iter(held))
    with pytest.raises(BackboneError, match="is wanted, got"):
        module.load(part, tensors | {name: tensors[name][:1, ..., :1]})


def test_merged_deltas_are_loaded_anew_each_time(vit: Backbone) -> None:
    spec, plain = SPECS["merged"], LORA
    weights = frozen_weights(vit)
    tensors = away_from_zero(vit, spec)
    zero = {n: np.zeros_like(t) if ".lora_merged." in n else t for n, t in tensors.items()}
    part, neighbour = (device_part(vit, Cut(4, 4), s, weights=weights) for s in (spec, plain))
    module.load(neighbour, tensors)
    inputs, mask, _ = make_batch("vit")
    with torch.no_grad():
        without = SplitModel(neighbour, Cut(4, 4), None)(inputs, mask)
        found = []
        for values in (tensors, tensors, zero, tensors):
            module.load(part, values)
            found.append(SplitModel(part, Cut(4, 4), None)(inputs, mask))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[3])
        assert torch.equal(found[2], without)
        assert not torch.equal(found[0], without)
        # What the parts share was not touched.
        assert torch.equal(SplitModel(neighbour, Cut(4, 4), None)(inputs, mask), without)


def test_a_low_rank_is_a_high_one_padded_with_zeros(vit: Backbone) -> None:
    low, high = replace(LORA, rank=2, max_rank=7), replace(LORA, rank=7, max_rank=7)
    tensors = away_from_zero(vit, low)
    padded = {}
    for name, value in tensors.items():
        a, b = ".lora_A." in name, ".lora_B." in name
        padded[name] = np.pad(value, ((0, 5 * a), (0, 5 * b))) if a or b else value
    assert {n: t.shape for n, t in padded.items()} == module.shapes(vit, high)
    torch.testing.assert_close(logits(vit, low, tensors), logits(vit, high, padded))


def test_a_sites_spec_has_the_runs_scale() -> None:
    config = RunConfig.from_flat({"lora-rank": 8, "lora-alpha": 4, "lora-ranks": "2;8"})
    site, server = (
        ModuleSpec.of(config.module, CLASSES, rank=2),
        ModuleSpec.of(config.module, CLASSES),
    )
    assert (site.rank, server.rank) == (2, 8)
    assert site.scale == server.scale == 0.5
    flora = RunConfig.from_flat({"lora-aggregation": "flora", "module-blocks": 2})
    assert ModuleSpec.of(flora.module, CLASSES).merged
    assert ModuleSpec.of(flora.module, CLASSES).last_blocks == 2


def test_a_full_part_owns_what_it_trains(vit: Backbone) -> None:
    weights = frozen_weights(vit)
    parts = [device_part(vit, Cut(4, 4), SPECS["full"], weights=weights) for _ in range(2)]
    server = server_part(vit, SPECS["full"], share=server_part(vit, SPECS["classifier"]))
    pointers = [
        {p.data_ptr() for p in module.parameters(part).values()} for part in (*parts, server)
    ]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


# The classifier's last layer, and prompts at the seam.


@families
def test_the_last_linear_makes_the_logits_of_the_features(
    family: str, tiny: dict[str, Path]
) -> None:
    backbone, spec = Backbone.find(str(tiny[family])), SPECS["classifier"]
    tensors = away_from_zero(backbone, spec)
    model = whole_model(backbone, spec, tensors)
    inputs, mask, _ = make_batch(family)
    weight, bias = module.final_linear(backbone, spec)
    with torch.no_grad():
        pooled_BP = model.pooled(model.head(inputs, mask), mask)
        features_BF = model.part.ends.features(pooled_BP)
        by_hand = features_BF @ torch.from_numpy(tensors[weight]).T
        if family != "llama":
            by_hand += torch.from_numpy(tensors[bias])
        torch.testing.assert_close(model.part.ends.classify(pooled_BP), by_hand)
        assert torch.equal(model(inputs, mask), model.part.ends.classify(pooled_BP))
    layers = {n.rpartition(".")[0] for n in tensors}
    assert torch.equal(features_BF, pooled_BP) == (layers == {weight.removesuffix(".weight")})
    start = module.initial(backbone, spec, seed=0)
    assert not any(start[n].any() for n in (weight, bias) if n in start)


def test_a_prompt_trains_where_gradients_come_back(vit: Backbone) -> None:
    spec, cut = SPECS["prompt"], Cut(0, 4)
    device, server = device_part(vit, cut, spec), server_part(vit, spec)
    tensors = away_from_zero(vit, spec)
    module.load(device, tensors)
    module.load(server, tensors)
    encoder = LocalEncoder(server, cut)
    model = SplitModel(device, cut, encoder)
    inputs, mask, _ = make_batch("vit")
    assert model.head_trains()
    assert model.head(inputs, mask).shape[1] == 1 + 16 + spec.prompt_tokens
    assert vit.max_tokens(0, 0, spec.prompt_tokens) >= 1 + 16 + spec.prompt_tokens
    model(inputs, mask).sum().backward()
    prompt = module.parameters(device)["vit.prompt.weight"]
    assert prompt.grad is not None
    assert prompt.grad.abs().min() > 0
    module.freeze_head(device, cut.a)
    assert not model.head_trains()
    model(inputs, mask)
    assert encoder.kept_steps == 0


def test_a_prompt_does_not_see_padding(tiny: dict[str, Path]) -> None:
    backbone, spec = Backbone.find(str(tiny["bert"])), SPECS["prompt"]
    model = whole_model(backbone, spec, away_from_zero(backbone, spec))
    inputs, mask, _ = make_batch("bert")
    with torch.no_grad():
        padded = model(inputs, mask)[3]
        alone = model({"input_ids": inputs["input_ids"][3:4, :2]}, None)[0]
    torch.testing.assert_close(padded, alone)


# What does not fit.


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(LORA, rank=25, max_rank=25), r"lora-rank=25 is above the width of vit.*, 24; .*lower"),
        (replace(LORA, rank=9, max_rank=8), r"rank 9 is not from 1 to lora-rank=8"),
        (replace(LORA, last_blocks=5), r"module-blocks=5 .*it has 4 blocks, so 0 \(all\) to 4"),
        (replace(LORA, last_blocks=-1), r"module-blocks=-1"),
        (replace(LORA, targets=("bogus",)), r"lora-targets: no linear layer 'bogus'"),
        (replace(SPECS["prompt"], last_blocks=1), r"for module=lora, adapter or full, not for module=prompt"),
        (replace(SPECS["prompt"], prompt_tokens=0), r"prompt-tokens=0 .*1 to 1024 is wanted"),
        (replace(SPECS["adapter"], adapter_width=0), r"adapter-width=0 .*raise adapter-width"),
    ],
)  # fmt: skip
def test_a_spec_that_does_not_fit(spec: ModuleSpec, said: str, vit: Backbone) -> None:
    for call in (
        lambda: module.check_spec(vit, spec),
        lambda: module.initial(vit, spec, seed=0),
        lambda: device_part(vit, Cut(1, 3), spec),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


def test_all_faults_are_told_at_once(vit: Backbone) -> None:
    bad = replace(LORA, rank=30, max_rank=20, last_blocks=9)
    assert len(module.spec_faults(vit, bad)) == 3
    with pytest.raises(ConfigError) as caught:
        module.check_spec(vit, bad)
    assert str(caught.value).count("\n") == 2


def test_a_family_without_prompts_says_so(vit: Backbone) -> None:
    odd = replace(vit, family=replace(vit.family, prompts=False))
    with pytest.raises(
        ConfigError, match=r"module=prompt: family 'vit' takes no prompt tokens; use"
    ):
        module.check_spec(odd, SPECS["prompt"])


def test_a_rank_may_be_all_of_a_layers_width(vit: Backbone) -> None:
    module.check_spec(vit, replace(LORA, rank=24, max_rank=24))
