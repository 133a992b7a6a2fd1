"""What predict says is what the run's own tests saw: bit for bit, in every family, kind of module and target.

The reference is `training.round.evaluate` over a split model with an encoder in between, and whole runs over the in-process
grid. Merged deltas are folded at export, so those alone are equal within 1e-5.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.scores import Scale
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs
from fedsplit.model.local_encoder import LocalEncoder
from fedsplit.model.module import ModuleSpec
from fedsplit.model.split import SplitModel, device_part, server_part
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.training.data import ImageTransform, TextTransform, batches, load_source
from fedsplit.training.data.examples import Examples
from fedsplit.training.round import evaluate
from fedsplit.training.site_data import SiteSources
from fedsplit.training.site_settings import SiteSettings
from fedsplit.training.task import CLASSIFICATION, Regression
from tests.federation.conftest import prepared, settings, simulated
from tests.model.copies import WORDS, add_tokenizer, copy_of
from tests.model.kinds import CLASSES, LORA, SPECS, away_from_zero
from tests.tiny import CONFIGS

NUMBER = replace(LORA, classes=("number",), numbers=Scale(mean=100, deviation=7))
CUT, INPUTS, BATCH = Cut(1, 3), Inputs(max_length=12), 4
TEXTS = (
    "pump leaks oil",
    "belt",
    "belts 3 oil",
    "ポンプ 3",
    "oil leaks belt pump oil belts",
    "3",
    "pump",
)


@pytest.fixture(scope="module")
def backbones(
    tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Backbone]:
    """The tiny backbones; those of texts with a tokenizer that pads as they want."""
    root, found = tmp_path_factory.mktemp("whole"), {}
    for family, path in tiny.items():
        if Backbone.find(str(path)).family.kind == "text":
            pad_is_one = json.loads((path / "config.json").read_text()).get("pad_token_id") == 1
            words = (WORDS[1], WORDS[0], *WORDS[2:]) if pad_is_one else WORDS
            path = add_tokenizer(copy_of(path, root / family), words=words)
        found[family] = Backbone.find(str(path))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Examples]:
    """kind of input -> ten samples of it."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (10, 20, 24, 3), np.uint8)
    np.savez(folder / "x.npz", x=images, y=np.arange(10) % 4)
    rows = [f"{TEXTS[i % len(TEXTS)]},{CLASSES[i % 4]}" for i in range(10)]
    (folder / "x.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return {
        "image": load_source(f"npz:{folder / 'x.npz'}", site="a"),
        "text": load_source(f"csv:{folder / 'x.csv'}", site="a"),
    }


def as_the_run_tests(
    backbone: Backbone, spec: ModuleSpec, tensors: Any, examples: Examples
) -> NDArray[np.float32]:
    """The outputs that a site at CUT counts, with the server's blocks in between."""
    device, server = device_part(backbone, CUT, spec), server_part(backbone, spec)
    for part in (device, server):
        module.load(part, tensors)
    model = SplitModel(device, CUT, LocalEncoder(server, CUT))
    transform: Any = (
        ImageTransform.from_backbone(backbone.path, INPUTS.image_size)
        if backbone.family.kind == "image"
        else TextTransform.from_backbone(backbone.path, INPUTS.max_length)
    )
    seen: list[torch.Tensor] = []

    def record(outputs: torch.Tensor) -> torch.Tensor:
        seen.append(outputs)
        return outputs

    task = CLASSIFICATION if spec.numbers is None else Regression(spec.numbers)
    steps = batches(examples, range(len(examples)), transform, batch_size=BATCH)
    evaluate(model, steps, adjust=record, task=task)
    return torch.cat(seen).numpy()


EVERYWHERE = ("lora", "merged", "prompt", "deep prompt", "adapter", "classifier", "full", "number")
CASES = [(family, kind) for family in CONFIGS for kind in EVERYWHERE]
CASES += [("vit", kind) for kind in SPECS if kind not in EVERYWHERE]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_outputs_are_those_of_the_runs_tests(
    family: str, kind: str, backbones: dict[str, Backbone], data: dict[str, Examples], tmp_path: Path
) -> None:  # fmt: skip
    backbone, spec = backbones[family], SPECS.get(kind, NUMBER)
    tensors, examples = away_from_zero(backbone, spec), data[backbone.family.kind]
    module.export(tmp_path / "module", backbone, spec, tensors, inputs=INPUTS)
    predictor = load_predictor(tmp_path, backbone=str(backbone.path))
    wanted = as_the_run_tests(backbone, spec, tensors, examples)
    found = predictor.over(examples, batch_size=BATCH)
    if kind == "merged":
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        assert (found.argmax(axis=1) == wanted.argmax(axis=1)).all()
    else:
        assert np.array_equal(found, wanted)
    one_by_one = in_batches(predictor, examples, BATCH)
    assert np.array_equal(one_by_one, found)
    alone = in_batches(predictor, examples, 1)
    np.testing.assert_allclose(alone, found, rtol=0, atol=1e-5 * max(1, np.abs(found).max()))


def in_batches(predictor: Predictor, examples: Examples, size: int) -> NDArray[np.float32]:
    """As whoever has samples, and no examples, asks."""
    items = [examples.items.get(int(key)) for key in examples.keys]
    rows = [predictor.prepare(item) for item in items]
    found = [predictor.outputs(rows[at : at + size]) for at in range(0, len(rows), size)]
    return np.concatenate(found)


def wear(folder: Path) -> list[dict[str, Any]]:
    """Two sites with images of a bar, whose length is the number in their tables."""
    nodes = []
    for number, name in enumerate(("line-a", "line-b")):
        rng, rows = np.random.default_rng(number), ["file,wear"]
        (folder / name).mkdir()
        for i in range(20):
            length = int(rng.integers(2, 30))
            pixels = np.zeros((32, 32), np.uint8)
            pixels[8 + i % 16 : 11 + i % 16, :length] = 255
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            rows.append(f"{i}.png,{100 + length}")
        (folder / name / "labels.csv").write_text("\n".join(rows))
        nodes.append({"site": name, "data": f"folder:{folder / name}", "label-column": "wear"})
    return nodes


@pytest.mark.parametrize("target", ["class", "number"])
def test_a_whole_runs_scores_are_those_of_predict(target: str, tmp_path: Path) -> None:
    """Each site's scores at the run's end come again from predict over the same samples, to the last digit."""
    nodes = simulated(2) if target == "class" else wear(tmp_path)
    more = {} if target == "class" else {"target": "number", "label_column": "wear", "sites": 2}
    config = settings(tmp_path / "runs", rounds=1, cut="1,5;6,6", **more)
    with prepared(config, nodes, in_simulation=target == "class") as (run, _):
        summary = run.go()
    predictor = load_predictor(tmp_path / "runs" / "run")
    for site, own in zip(
        sorted(summary.sites, key=lambda s: s.name), samples_of(config, nodes), strict=True
    ):
        outputs = predictor.over(own, batch_size=config.train.batch_size)
        labels = torch.from_numpy(own.labels if own.numbers is None else own.numbers)
        sums = [
            predictor.task.sums(torch.from_numpy(outputs[at : at + 32]), labels[at : at + 32])
            for at in range(0, len(own), 32)
        ]
        assert config.train.batch_size == 32
        total = {name: sum(one[name] for one in sums) for name in sums[0]}
        if target == "class":
            assert site.accuracy == total["correct"] / len(own)
        else:
            assert site.scores is not None
            assert site.scores["mae"] == total["abs"] / len(own)


def samples_of(config: RunConfig, nodes: list[dict[str, Any]]) -> list[Examples]:
    """The test samples of each site."""
    backbone, sources, found = Backbone.find(config.placement.backbone), SiteSources(), []
    for node in nodes:
        site = SiteSettings.from_node(node, node_id=0).for_task(config)
        assert site is not None
        own = sources.open(config, site, backbone, None)
        found.append(own.examples.subset(own.test))
    return found


def test_the_text_runs_scores_too(trained_text_module: Path) -> None:
    predictor = load_predictor(trained_text_module)
    summary = json.loads((trained_text_module / "summary.json").read_text())
    flat = json.loads((trained_text_module / "config.json").read_text())["config"]
    config = RunConfig.from_flat(flat)
    right = total = 0
    for own in samples_of(config, simulated(2)):
        outputs = predictor.over(own, batch_size=config.train.batch_size)
        right += int((outputs.argmax(axis=1) == own.labels).sum())
        total += len(own)
    assert summary["accuracy_global"] == right / total


def test_files_of_every_kind_are_read_as_training_reads_them(tmp_path: Path) -> None:
    """A source of deep files: predict, file by file, prepares what the run's own reading of the whole source gives."""
    from tests.predict.samples import ramps

    found = ramps(tmp_path / "ramps")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in found.values():
            shutil.copy(path, tmp_path / "data" / name / path.name)
    examples = load_source(f"folder:{tmp_path / 'data'}", site="a")
    assert examples.pixel_max == 4095
    backbone = Backbone.find("vit-glyphs")
    inputs = Inputs.of(RunConfig.from_flat({}), [examples.pixel_max])
    module.export(
        tmp_path / "module", backbone, LORA, away_from_zero(backbone, LORA), inputs=inputs
    )
    predictor = load_predictor(tmp_path)
    for i in range(len(examples)):
        prepared_here = predictor.prepare(Path(examples.origin(i)))
        assert np.array_equal(prepared_here, predictor.transform.resize(examples.image(i)))  # type: ignore[union-attr]
        raw = Path(examples.origin(i)).read_bytes()
        assert np.array_equal(predictor.prepare(raw), prepared_here)
    # All of them show the same ramp.
    grey = predictor.prepare(found["grey.png"]).astype(int)
    for name, path in found.items():
        apart = np.abs(predictor.prepare(path).astype(int) - grey).max()
        assert apart <= (16 if name == "cmyk.jpg" else 1), name
