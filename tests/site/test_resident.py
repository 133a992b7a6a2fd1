"""One runtime for years equals a new one for each run, whatever was replaced meanwhile.

A resident runtime does one run after the other; before each of them something changes. A runtime that has just been made
does the same run, and both must give the same numbers and the same module, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.core.records import RoundMetrics
from fedsplit.federation.engine.in_process import InProcessGrid
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.federation.site import answer
from fedsplit.model.backbone import Backbone
from fedsplit.model.store import BackboneStore
from fedsplit.site.runtime import SiteRuntime
from fedsplit.training.data.image_files import ImageFiles
from fedsplit.training.site_settings import SiteSettings
from fedsplit.trunk.process import hosting
from tests.model.stores import fill

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)


@dataclass
class Plant:
    """A site's machine: its data, its backbone, and what its runs are told. Each case changes something of it."""

    folder: Path
    node: dict[str, Any] = field(default_factory=dict)
    flat: dict[str, Any] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self) -> None:
        for i in range(30):
            self.picture(f"{'ab'[i % 2]}/{i}.pgm", i)
        self.table(range(30))
        shutil.copytree(Backbone.find("vit-glyphs").path, self.backbone)
        self.node = {"site": "line-a", "data": f"folder:{self.folder / 'pictures'}"}
        self.flat = {"backbone": str(self.backbone)}

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    def picture(self, name: str, number: int) -> None:
        path = self.folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(path)

    def table(self, numbers: range, name: str = "table.npz") -> None:
        x = PIXELS[list(numbers)].astype(np.uint16)
        np.savez(self.folder / name, x=x, y=np.array(["ab"[i % 2] for i in numbers]))

    def run(self, runtime: SiteRuntime, state: str) -> tuple[list[dict[str, Any]], Any]:
        """A run's numbers and its module. Always of the same name, as it may be at a server that is set up anew."""
        self.runs += 1
        config = RunConfig.from_flat(
            {
                "run-name": "nightly", "runs-dir": str(self.folder / f"runs-{self.runs}"), "rounds": 1, "sites": 1,
                "min-sites": 1, "max-samples": 0, "cut": "1,6", "device-training": "tail", "classifier-init": "zero",
                "cache-activations": True, "deadline-s": 60.0,
            } | self.flat
        )  # fmt: skip
        node = self.node | {"state-dir": str(self.folder / state)}
        simulated = "partition-id" in node
        with (
            hosting(config, None) as (server, host, key),
            InProcessGrid([node], partial(answer, runtime=runtime)) as grid,
        ):
            at = Endpoint(
                server.address,
                key,
                tls=False,
                ca_file="",
                publish=host.publish,
                collect=host.collect,
            )
            run = Run(grid, config, at, simulated=simulated)
            assert run.go().outcome == "complete"
        assert run._strategy is not None
        return [numbers(m) for m in run.dir.read_metrics()], run._strategy.module


def numbers(metrics: RoundMetrics) -> dict[str, Any]:
    """What does not depend on the clock."""
    own = (
        "round", "samples", "test_samples", "sums_global", "sums_personal", "loss", "steps", "flops_device",
        "bytes_activation_up", "bytes_module_up",
    )  # fmt: skip
    return {name: getattr(metrics, name) for name in own}


def as_it_was(path: Path, change: Callable[[], None]) -> None:
    """Change a file in place: its size and its time of change stay."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def new_pictures(plant: Plant) -> None:
    for i in range(30, 34):
        plant.picture(f"{'ab'[i % 2]}/{i}.pgm", i)


def a_picture_replaced(plant: Plant) -> None:
    path = plant.folder / "pictures/a/0.pgm"
    as_it_was(path, lambda: plant.picture("a/0.pgm", 50))


def a_picture_gone(plant: Plant) -> None:
    (plant.folder / "pictures/b/1.pgm").unlink()


def weights_replaced(plant: Plant) -> None:
    file = plant.backbone / "model.safetensors"

    def change() -> None:
        data = bytearray(file.read_bytes())
        # The lowest bit of an exponent: a half or the double.
        for at in range(len(data) - 4096, len(data), 4):
            data[at + 2] ^= 0x80
        file.write_bytes(data)

    as_it_was(file, change)


def pictures_prepared_otherwise(plant: Plant) -> None:
    file = plant.backbone / "preprocessor_config.json"
    said = json.loads(file.read_text())
    said["image_mean"] = [0.25] * 3
    file.write_text(json.dumps(said))


def a_table(plant: Plant) -> None:
    plant.node["data"] = f"npz:{plant.folder / 'table.npz'}"


def a_table_replaced(plant: Plant) -> None:
    path = plant.folder / "table.npz"
    as_it_was(path, lambda: plant.table(range(40, 70)))


def another_white(plant: Plant) -> None:
    plant.node["pixel-max"] = 400


def threads(plant: Plant) -> None:
    plant.node["threads"] = 2 if torch.get_num_threads() != 2 else 1


def no_threads(plant: Plant) -> None:
    del plant.node["threads"]


def simulation(plant: Plant) -> None:
    plant.node = {"partition-id": 0, "num-partitions": 2}
    plant.flat["data"] = f"npz:{plant.folder / 'table.npz'}"


def its_table_replaced(plant: Plant) -> None:
    a_table_replaced(plant)
    as_it_was(plant.folder / "table.npz", lambda: plant.table(range(55, 85)))


def setting(**flat: Any) -> Callable[[Plant], None]:
    def change(plant: Plant) -> None:
        plant.flat |= {k.replace("_", "-"): v for k, v in flat.items()}

    change.__name__ = "_".join(flat)
    return change


CASES = [
    new_pictures, a_picture_replaced, a_picture_gone, weights_replaced, pictures_prepared_otherwise, setting(seed=7),
    setting(test_fraction=0.4), a_table, a_table_replaced, another_white, threads, no_threads,
    simulation, its_table_replaced, setting(partition="quantity:1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return Plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture(scope="module")
def resident(plant: Plant) -> SiteRuntime:
    """It has done a run before the first case."""
    runtime = SiteRuntime()
    plant.run(runtime, "state")
    return runtime


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_a_resident_runtime_equals_a_new_one(
    change: Callable[[Plant], None], plant: Plant, resident: SiteRuntime
) -> None:
    change(plant)
    if (plant.folder / "state").exists():
        shutil.copytree(plant.folder / "state", plant.folder / "other", dirs_exist_ok=True)
    before = torch.get_num_threads()
    found, module = plant.run(resident, "state")
    now = torch.get_num_threads()
    wanted, as_new = plant.run(SiteRuntime(), "other")
    assert found == wanted
    assert module.keys() == as_new.keys()
    assert all(np.array_equal(module[name], as_new[name]) for name in module)
    if change is no_threads:
        assert now != before


def test_a_personal_model_of_another_run_of_the_same_name(tmp_path: Path) -> None:
    """A site keeps it by the run, and a server that is set up anew begins again with the names of its runs."""
    plant, runtime = Plant(tmp_path), SiteRuntime()
    plant.flat["personalisation"] = "ditto"
    first, module = plant.run(runtime, "state")
    again, same = plant.run(runtime, "state")
    assert first == again
    assert all(np.array_equal(module[name], same[name]) for name in module)


def test_a_backbone_is_found_by_its_digest(tmp_path: Path) -> None:
    """In the site's own folder first, whatever the run calls it."""
    plant, runtime = Plant(tmp_path), SiteRuntime()
    store = BackboneStore(tmp_path / "backbones")
    path = fill(store, plant.backbone, Cut(1, 6))
    plant.node["backbone-dir"] = str(store.folder)
    plant.run(runtime, "state")
    assert runtime.kept.parts.frozen(Backbone.find(str(path))).loads == 1
    assert runtime.kept.parts.frozen(Backbone.find(str(path))).backbone.path == path


def test_a_backbone_that_is_in_neither_place(tmp_path: Path) -> None:
    site = SiteSettings.from_node({"site": "line-a", "backbone-dir": str(tmp_path)}, node_id=1)
    with pytest.raises(
        BackboneError, match=r"backbone 000000000000: it is not here at all; .*/nowhere is no such"
    ):
        SiteRuntime()._backbone(site, "0" * 64, "/nowhere")


def test_a_warm_runtime_reads_neither_weights_nor_pictures_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, runtime = Plant(tmp_path), SiteRuntime()
    plant.node["cut"] = "1,6"
    site = SiteSettings.from_node(plant.node, node_id=1)
    with caplog.at_level("INFO"):
        runtime.warm(site, backbone=str(plant.backbone))
    for what in ("the code", "the backbone", "the data"):
        assert f"{what}: loaded in " in caplog.text
    assert runtime.kept.parts.loads == 1
    monkeypatch.setattr(ImageFiles, "look", lambda *_: pytest.fail("a picture is looked at again"))
    plant.run(runtime, "state")
    assert runtime.kept.parts.loads == 1


@pytest.mark.parametrize(
    ("change", "backbone", "told"),
    [
        ({"data": "folder:/nowhere"}, "vit-glyphs", r"the data cannot be .*/nowhere: does not exist"),
        ({}, "/nowhere", r"the backbone cannot be loaded before the first order: .*/nowhere"),
        ({"cut": "3,20"}, "vit-glyphs", r"the backbone cannot be loaded before the first order: .*3,20"),
        ({"cut": ""}, "vit-glyphs", r"has no cut of its own"),
        ({"tasks": "a;b=digits"}, "vit-glyphs", r"the data of task b: loaded"),
    ],
)  # fmt: skip
def test_what_cannot_be_warmed_is_told(
    change: dict[str, str],
    backbone: str,
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Plant(tmp_path).node | {"cut": "1,6"} | change
    site = SiteSettings.from_node({k: v for k, v in node.items() if v}, node_id=1)
    with caplog.at_level("INFO"):
        SiteRuntime().warm(site, backbone=backbone)
    assert re.search(told, caplog.text)
