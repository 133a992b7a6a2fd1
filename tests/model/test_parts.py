"""Parts that are used again: as good as new, one borrower at a time, and bounded in number and memory."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.part import Part
from fedsplit.model.parts import MAX_BACKBONES, PartPool
from fedsplit.model.split import SplitModel, device_part
from tests.model.kinds import LORA, SPECS, away_from_zero
from tests.model.whole import make_batch, split_step

HERE = Cut(4, 4)


def one_step(part: Part, tensors: module.ModuleTensors) -> dict[str, Any]:
    module.load(part, tensors)
    inputs, mask, labels = make_batch("vit")
    return split_step(SplitModel(part, HERE, None), inputs, mask, labels)


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SPECS)
def test_a_part_borrowed_again_is_as_good_as_new(kind: str, vit: Backbone) -> None:
    spec, pool = SPECS[kind], PartPool()
    first, second = (away_from_zero(vit, spec, seed=s) for s in (1, 2))
    with pool.borrowed(vit, HERE, spec) as part:
        used = part
        one_step(part, first)
        module.freeze_classifier(part)
        module.freeze_head(part, 3)
    with pool.borrowed(vit, HERE, spec) as part:
        assert part is used
        assert all(p.grad is None for p in part.model.parameters())
        again = one_step(part, second)
    assert_equal(again, one_step(device_part(vit, HERE, spec), second))


@pytest.mark.parametrize("kind", SPECS)
def test_training_leaves_the_shared_weights_alone(kind: str, vit: Backbone) -> None:
    pool, bare = PartPool(), SPECS["classifier"]
    tensors = away_from_zero(vit, bare)
    with pool.borrowed(vit, HERE, bare) as neighbour:
        before = one_step(neighbour, tensors)
        with pool.borrowed(vit, HERE, SPECS[kind]) as part:
            one_step(part, away_from_zero(vit, SPECS[kind]))
        neighbour.model.zero_grad()
        assert_equal(one_step(neighbour, tensors), before)


def test_frozen_tensors_are_held_once(vit: Backbone) -> None:
    pool = PartPool()
    with pool.borrowed(vit, HERE, LORA) as one, pool.borrowed(vit, Cut(1, 3), LORA) as other:
        assert one is not other
        held = {n: p for n, p in other.model.named_parameters() if not p.is_meta}
        mine = dict(one.model.named_parameters())
        own = {n for n, p in held.items() if p.data_ptr() != mine[n].data_ptr()}
        assert own
        assert all(".lora_" in n or n.startswith("classifier.") for n in own)


def test_only_what_is_wanted_is_read(vit: Backbone) -> None:
    weights = PartPool().frozen(vit)
    device_part(vit, Cut(0, 4), LORA, weights=weights)
    assert all(n.startswith("vit.embeddings.") for n in weights.names)
    device_part(vit, Cut(1, 3), LORA, weights=weights)
    assert {n.split(".")[2] for n in weights.names if ".layers." in n} == {"0", "3"}


def test_a_part_has_one_borrower(vit: Backbone) -> None:
    pool, seen, lock = PartPool(), set[int](), threading.Lock()
    faults: list[str] = []

    def site() -> None:
        for _ in range(4):
            with pool.borrowed(vit, HERE, LORA) as part:
                with lock:
                    if id(part) in seen:
                        faults.append("two borrowers")
                    seen.add(id(part))
                one_step(part, tensors)
                with lock:
                    seen.remove(id(part))

    tensors = away_from_zero(vit, LORA)
    threads = [threading.Thread(target=site) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert pool.idle <= 3


def test_other_settings_get_another_part(vit: Backbone, tiny: dict[str, Path]) -> None:
    pool = PartPool()
    with pool.borrowed(vit, HERE, LORA) as part:
        first = part
    for backbone, cut, spec in (
        (vit, Cut(1, 3), LORA),
        (vit, HERE, replace(LORA, rank=2)),
        (Backbone.find(str(tiny["deit"])), HERE, LORA),
    ):
        with pool.borrowed(backbone, cut, spec) as part:
            assert part is not first
            assert (part.backbone, part.held) == (backbone, cut.device_blocks(4))


def test_idle_parts_are_bounded(vit: Backbone) -> None:
    pool = PartPool(max_idle=2)
    for rank in (1, 2, 3, 4):
        with pool.borrowed(vit, HERE, replace(LORA, rank=rank, max_rank=4)):
            pass
    assert pool.idle == 2
    with pool.borrowed(vit, HERE, replace(LORA, rank=4, max_rank=4)):
        assert pool.idle == 1


def test_idle_bytes_are_bounded(vit: Backbone) -> None:
    small, full = SPECS["classifier"], SPECS["full"]
    pool = PartPool(max_idle_bytes=vit.weight_bytes() // 2)
    for spec, idle in ((small, 1), (full, 0)):
        with pool.borrowed(vit, HERE, spec):
            pass
        assert pool.idle == idle


def test_backbones_are_bounded(tiny: dict[str, Path]) -> None:
    pool, backbones = PartPool(), [Backbone.find(str(path)) for path in tiny.values()]
    weights = [pool.frozen(backbone) for backbone in backbones]
    assert pool.frozen(backbones[-1]) is weights[-1]
    assert pool.frozen(backbones[-1 - MAX_BACKBONES]) is not weights[-1 - MAX_BACKBONES]


def test_one_digest_is_one_backbone_wherever_it_lies(vit: Backbone, tmp_path: Path) -> None:
    """Another run, task or folder reuses what is loaded; weights that were replaced in place do not."""
    pool, bare = PartPool(), SPECS["classifier"]
    with pool.borrowed(vit, HERE, bare) as part:
        first = part
    copy = Path(shutil.copytree(vit.path, tmp_path / "copy"))
    with pool.borrowed(Backbone.find(str(copy)), HERE, bare) as part:
        assert part is first
    assert pool.loads == 1
    altered(copy)
    other = Backbone.find(str(copy))
    with pool.borrowed(other, HERE, bare) as part:
        assert part is not first
    assert pool.loads == 2
    made_anew = device_part(other, HERE, bare).model.state_dict()
    torch.testing.assert_close(part.model.state_dict(), made_anew, rtol=0, atol=0)


def altered(folder: Path) -> None:
    """Change a weight in place: the same size, the same time of change."""
    file = folder / "model.safetensors"
    info = file.stat()
    with file.open("r+b") as raw:
        raw.seek(-2, os.SEEK_END)
        last = raw.read(1)[0]
        raw.seek(-2, os.SEEK_END)
        raw.write(bytes([last ^ 0x40]))
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_weights_that_are_replaced_while_a_part_is_built(vit: Backbone, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vit.path, tmp_path / "copy"))
    pool, backbone = PartPool(), Backbone.find(str(copy))
    weights = pool.frozen(backbone)
    altered(copy)
    with pytest.raises(BackboneError, match="were replaced while a run uses them"):
        device_part(backbone, HERE, LORA, weights=weights)
    assert not weights.names


def test_weights_that_no_part_uses_are_bounded(vit: Backbone, tiny: dict[str, Path]) -> None:
    pool = PartPool(max_idle=1, max_idle_bytes=2000)
    bare = SPECS["classifier"]
    with pool.borrowed(vit, HERE, bare):
        pass
    with pool.borrowed(vit, Cut(0, 4), bare) as part:
        held = {p.data_ptr() for p in part.model.parameters() if not p.is_meta}
    weights = pool.frozen(vit)
    # Those of the blocks went with the part of the cut before.
    assert weights.nbytes() > 0
    assert weights.nbytes(but=held) == 0
    assert pool.full
    with pool.borrowed(Backbone.find(str(tiny["deit"])), HERE, bare):
        pass
    assert pool.frozen(vit) is not weights
    assert pool.loads == 2


def test_after_an_error_a_part_is_not_used_again(vit: Backbone) -> None:
    pool = PartPool()
    with pytest.raises(KeyError), pool.borrowed(vit, HERE, LORA):
        raise KeyError
    assert pool.idle == 0
