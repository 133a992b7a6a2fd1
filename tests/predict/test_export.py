"""A module for other programs: it answers as the module itself does, or the export says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsplit.core.errors import ConfigError, ExportError
from fedsplit.core.scores import Scale
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs
from fedsplit.model.preprocess import read_preprocess
from fedsplit.predict.export import card as cards
from fedsplit.predict.export.check import TOLERANCE, batches, difference
from fedsplit.predict.export.write import export_module
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.training.data import load_source
from tests.model.copies import add_tokenizer, copy_of
from tests.model.kinds import SPECS, away_from_zero
from tests.tiny import CONFIGS


def predictor_of(
    family: str, kind: str, tiny: dict[str, Path], folder: Path, **spec: Any
) -> Predictor:
    backbone = copy_of(tiny[family], folder / "backbones" / family)
    if family not in ("vit", "deit", "dinov2"):
        add_tokenizer(backbone)
    found = Backbone.find(str(backbone))
    made = SPECS[kind] if not spec else module.ModuleSpec(**{**vars(SPECS[kind]), **spec})
    module.export(
        folder / "module", found, made, away_from_zero(found, made), inputs=Inputs(max_length=12)
    )
    return load_predictor(folder / "module")


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_merged_and_as_onnx(
    family: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    predictor = predictor_of(family, "lora", tiny, tmp_path)
    merged = export_module(predictor, "merged", tmp_path / "merged")
    assert merged.difference is not None
    assert merged.difference < 1e-6
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    made = export_module(predictor, "onnx", tmp_path / "onnx")
    assert made.difference is not None
    assert made.difference < 1e-6


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("vit", kind) for kind in SPECS if kind not in ("lora", "low rank", "full blocks")),
        *(("modernbert", kind) for kind in ("deep prompt", "adapter", "full")),
    ],
)
def test_every_kind(family: str, kind: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    predictor = predictor_of(family, kind, tiny, tmp_path)
    added = predictor.spec.kind in ("prompt", "adapter")
    if added:
        with pytest.raises(ConfigError, match=r"cannot be merged: it adds layers .* --to onnx"):
            export_module(predictor, "merged", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    else:
        assert (export_module(predictor, "merged", tmp_path / "merged").difference or 0) < 1e-6
    layout = export_module(predictor, "hf", tmp_path / "hf")
    assert "README.md" in layout.files
    if predictor.spec.kind != "full":
        again = load_predictor(tmp_path / "hf", backbone=str(predictor.backbone.path))
        batch = next(iter(batches(predictor)))
        assert np.array_equal(again.outputs(batch), predictor.outputs(batch))
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if added or family == "vit":
        assert (export_module(predictor, "onnx", tmp_path / "onnx").difference or 0) < 1e-6


@pytest.mark.parametrize("family", ["dinov2", "llama"])
def test_numbers_come_out_in_their_unit(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    scale = Scale(mean=20.0, deviation=4.0)
    predictor = predictor_of(family, "lora", tiny, tmp_path, classes=("number",), numbers=scale)
    export_module(predictor, "onnx", tmp_path / "onnx")
    session = ort.InferenceSession(tmp_path / "onnx" / "model.onnx")
    batch = list(batches(predictor))[-1]
    inputs, _ = predictor.transform.assemble(batch)
    feeds = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    got = session.run(["number"], feeds)[0]
    np.testing.assert_allclose(got, predictor.probabilities(predictor.outputs(batch)), rtol=1e-5)
    export_module(predictor, "merged", tmp_path / "merged")
    assert "* 4.0 + 20.0" in (tmp_path / "merged" / "README.md").read_text()


def test_the_run_on_digits(trained_image_module: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    predictor = load_predictor(trained_image_module)
    examples = load_source("digits", site="here", max_samples=200, classes=predictor.classes)
    made = export_module(predictor, "onnx", tmp_path / "onnx", int8_on=examples)
    assert (tmp_path / "onnx/model.int8.onnx").stat().st_size < 0.4 * (
        tmp_path / "onnx/model.onnx"
    ).stat().st_size
    assert made.int8["samples"] == 200
    assert made.int8["before"] > 0.7
    assert abs(made.int8["before"] - made.int8["after"]) < 0.05
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "int8: accuracy goes from" in card
    assert "Licence: apache-2.0" in card
    assert "> Limits" in card
    assert "| site 1 |" in card
    assert "site-0" not in card
    named = export_module(predictor, "hf", tmp_path / "hf", name_sites=True)
    assert "adapter_model.safetensors" in named.files
    name = json.loads((trained_image_module / "summary.json").read_text())["sites"][0]["name"]
    assert f"| {name} |" in (tmp_path / "hf" / "README.md").read_text()


def test_image_settings_are_written_as_the_run_resolved_them(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    predictor = predictor_of("dinov2", "lora", tiny, tmp_path)
    export_module(predictor, "merged", tmp_path / "merged")
    assert read_preprocess(tmp_path / "merged") == predictor.transform.settings  # type: ignore[union-attr]
    assert Backbone.find(str(tmp_path / "merged")).blocks == predictor.backbone.blocks


def test_a_wrong_export_is_never_left(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = predictor_of("vit", "lora", tiny, tmp_path)
    with torch.no_grad():  # the module in memory is another than that on disk
        next(iter(module.parameters(predictor.model.part).values())).mul_(1.5)
    with pytest.raises(
        ExportError, match=r"does not answer as the module does: its outputs differ by"
    ):
        export_module(predictor, "merged", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_what_cannot_be_asked_for(tiny: dict[str, Path], tmp_path: Path) -> None:
    predictor = predictor_of("vit", "lora", tiny, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already; give --out a new folder"):
        export_module(predictor, "merged", tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--to 'tflite' is not known; onnx, merged, hf are"):
        export_module(predictor, "tflite", tmp_path / "out")


def test_difference_sees_what_is_no_number() -> None:
    one = np.ones((2, 3), np.float32)
    assert difference(one, one) == 0
    assert difference(one, one[:1]) == float("inf")
    assert difference(one, one * np.nan) == float("inf")
    assert difference(one, one * 1.01) > TOLERANCE


def test_a_backbones_own_card(tmp_path: Path) -> None:
    assert cards.about_backbone(tmp_path) == (cards.UNKNOWN, "")
    text = "---\nlicense: mit\n---\n# X\n## Bias\nIt knows parts\x1b of one maker.\n### More\nmetal\n## Use\nno"
    (tmp_path / "README.md").write_text(text)
    assert cards.about_backbone(tmp_path) == (
        "mit",
        "Bias\nIt knows parts\\x1b of one maker.\nMore\nmetal",
    )
