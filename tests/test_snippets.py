"""Every Python block of the documentation is run as it stands, and does what the page says.

What a page leaves to the reader (a folder, arrays of one's own) is given beforehand; nothing else is changed but the
backbone, where a page says that it may be another.
"""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError, DataError
from fedsplit.model import families, module
from fedsplit.model.backbone import Backbone
from fedsplit.model.inputs import Inputs
from fedsplit.model.module import ModuleSpec
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.serve.answering import Answering
from fedsplit.training.data import load_source
from tests.federation.conftest import prepared, settings, simulated
from tests.model.copies import add_tokenizer, change_tensors, copy_of
from tests.model.kinds import SPECS, away_from_zero
from tests.model.test_split_equals_whole import Compared
from tests.model.whole import make_batch
from tests.predict.serving import serving
from tests.test_docs import FENCE, PAGES, ROOT
from tests.tiny import CONFIGS, save

LORA = ModuleSpec(classes=tuple("0123456789"), rank=3, alpha=6)
USE = "docs/how-to/use-the-module.md"
BLOCKS = {
    "docs/explanation/costs.md": 1,
    "docs/how-to/new-family.md": 4,
    "docs/how-to/own-data.md": 2,
    "docs/how-to/serve.md": 1,
    USE: 3,
    "docs/tutorials/first-run.md": 1,
}


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for kind, body in FENCE.findall(text) if kind == "python"]


def run(source: str, folder: Path, **given: Any) -> dict[str, Any]:
    """What the block leaves behind; it is run as a file in the working folder."""
    path = folder / "snippet.py"
    path.write_text(source, encoding="utf-8")
    return runpy.run_path(str(path), init_globals=given)


def test_no_block_is_left_out() -> None:
    pages = {p.relative_to(ROOT).as_posix() for p in PAGES}
    found = {page: len(snippets(page)) for page in pages if snippets(page)}
    assert found == BLOCKS


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first run's folder: its pictures, and `runs/first` trained on them."""
    folder = tmp_path_factory.mktemp("first-run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(snippets("docs/tutorials/first-run.md")[0], folder)
        config = settings(
            folder / "runs", run_name="first", data="folder:pictures", task="pictures", cut="1,5;0,6;6,6", rounds=1,
            max_samples=0,
        )  # fmt: skip
        with prepared(config, simulated(3)) as (started, _):
            assert started.go().outcome == "complete"
    return folder


def test_the_first_runs_pictures_and_module(
    first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fedsplit's way and PEFT's say the same of the same picture, to the last digit that the page shows."""
    monkeypatch.chdir(first)
    ours, theirs, _ = snippets(USE)
    mine = run(ours, first)
    line = capsys.readouterr().out.splitlines()[-1]
    other = run(theirs, first)
    assert line == f"lora {capsys.readouterr().out.splitlines()[-1]}"
    assert mine["best"] == "3"
    mine_C = logits(mine["predictor"], "pictures/3/0003.png")
    assert torch.equal(mine_C, other["outputs"].logits[0])


def inputs(predictor: Predictor, sample: Any) -> dict[str, torch.Tensor]:
    return predictor.transform.assemble([predictor.prepare(sample)])[0]


def logits(predictor: Predictor, sample: Any) -> torch.Tensor:
    return torch.from_numpy(predictor.outputs([predictor.prepare(sample)])[0])


def test_a_line_asks_the_service(
    first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a free port; the page's is the reader's."""
    monkeypatch.chdir(first)
    monkeypatch.setenv("no_proxy", "*")
    shutil.copy("pictures/3/0003.png", "part.png")
    (source,) = snippets("docs/how-to/serve.md")
    with serving(Answering(load_predictor("runs/first"))) as (service, _):
        run(source.replace("http://127.0.0.1:8080", service.address), first)
    assert capsys.readouterr().out == "3\n"


@dataclass
class Place:
    """A folder as the pages have it, with a module that does something."""

    folder: Path
    backbone: Backbone

    def leave(self, spec: ModuleSpec, prepared: Inputs) -> None:
        tensors = away_from_zero(self.backbone, spec)
        folder = self.folder / "runs" / "first" / "module"
        module.export(folder, self.backbone, spec, tensors, inputs=prepared)


@pytest.fixture
def place(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    def make(backbone: str) -> Place:
        (tmp_path / "pictures").symlink_to(first / "pictures")
        monkeypatch.chdir(tmp_path)
        return Place(tmp_path, Backbone.find(backbone))

    return make


def on(backbone: Backbone, source: str) -> str:
    """The block for another backbone than the bundled one, changed as the page says."""
    source = re.sub(r"^backbone = .*$", f"backbone = {str(backbone.path)!r}", source, flags=re.M)
    ours = 'load_predictor("runs/first"'
    source = source.replace(ours, f"{ours}, backbone={str(backbone.path)!r}")
    wanted = "num_labels=len(classes)"
    return source.replace(wanted, f"{wanted}, ignore_mismatched_sizes=True")


@pytest.mark.parametrize("side", [96, 0])
def test_the_same_on_real_weights_at_the_runs_size(
    side: int, place: Callable[..., Place], vit_tiny: Path
) -> None:
    here = place(str(vit_tiny))
    here.leave(LORA, Inputs(image_size=side))
    ours, theirs, _ = (on(here.backbone, source) for source in snippets(USE))
    predictor = run(ours, here.folder)["predictor"]
    pixels = inputs(predictor, "pictures/3/0003.png")["pixel_values"]
    assert pixels.shape == (1, 3, side or 224, side or 224)
    outputs = run(theirs, here.folder)["outputs"]
    assert torch.equal(logits(predictor, "pictures/3/0003.png"), outputs.logits[0])


def test_half_precision_loads_as_the_run_computed(
    place: Callable[..., Place], tiny: dict[str, Path]
) -> None:
    folder = copy_of(tiny["vit"], tiny["vit"].parent / "half", dtype="float16")
    change_tensors(folder, lambda _, t: t.to(torch.float16))
    here = place(str(folder))
    here.leave(LORA, Inputs())
    ours, theirs, _ = (on(here.backbone, source) for source in snippets(USE))
    predictor = run(ours, here.folder)["predictor"]
    outputs = run(theirs, here.folder)["outputs"]
    assert outputs.logits.dtype == torch.float32
    assert torch.equal(logits(predictor, "pictures/3/0003.png"), outputs.logits[0])


def test_a_full_module_in_transformers(place: Callable[..., Place]) -> None:
    here = place("vit-glyphs")
    here.leave(ModuleSpec(classes=LORA.classes, kind="full"), Inputs())
    given = {"backbone_folder": here.backbone.path, "classes": LORA.classes}
    whole = run(snippets(USE)[2], here.folder, **given)["whole"].eval()
    predictor = load_predictor("runs/first/module")
    given = inputs(predictor, "pictures/3/0003.png")
    with torch.no_grad():
        assert torch.equal(whole(**given).logits[0], logits(predictor, "pictures/3/0003.png"))


def test_texts_are_cut_where_the_run_cut_them(
    place: Callable[..., Place], tiny: dict[str, Path]
) -> None:
    here = place(str(add_tokenizer(copy_of(tiny["bert"], tiny["bert"].parent / "words"))))
    here.leave(LORA, Inputs(max_length=5))
    predictor = load_predictor("runs/first/module", backbone=str(here.backbone.path))
    assert inputs(predictor, "pump leaks oil belt pump")["input_ids"].shape == (1, 5)
    assert sum(predictor.predict("pump leaks oil").values()) == pytest.approx(1)
    with pytest.raises(DataError, match="reads texts"):
        predictor.prepare(np.zeros((4, 4, 3), np.uint8))


def test_deep_pictures_are_read_with_the_range_of_the_run(
    place: Callable[..., Place],
) -> None:
    assert Inputs.of(RunConfig(), {4095.0}).pixel_max == 4095
    assert Inputs.of(RunConfig(), {4095.0, 255.0}).pixel_max == 0
    assert Inputs.of(RunConfig(), {1.0}).pixel_max == 0
    here = place("vit-glyphs")
    here.leave(LORA, Inputs(pixel_max=4095))
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    Image.fromarray(np.rint(4095 * ramp).astype(np.uint16)).save("deep.png")
    Image.fromarray(np.rint(255 * ramp).astype(np.uint8)).save("flat.png")
    predictor = load_predictor("runs/first/module")
    deep = inputs(predictor, "deep.png")["pixel_values"]
    assert deep.max() == 1
    torch.testing.assert_close(
        deep,
        inputs(load_predictor("runs/first/module", pixel_max=255), "flat.png")["pixel_values"],
        rtol=0,
        atol=0.009,
    )


def test_deep_pictures_without_a_range_are_refused(place: Callable[..., Place]) -> None:
    here = place("vit-glyphs")
    here.leave(LORA, Inputs())
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.float32)).save("floats.tif")
    with pytest.raises(DataError, match=r"go up to 1, .*load_predictor\(\.\.\., pixel_max="):
        load_predictor("runs/first/module").prepare("floats.tif")
    told = inputs(load_predictor("runs/first/module", pixel_max=1), "floats.tif")
    assert (told["pixel_values"].min(), told["pixel_values"].max()) == (-1, 1)


def test_what_is_no_picture_is_told(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first)
    predictor = load_predictor("runs/first/module")
    from_pixels = logits(predictor, np.zeros((8, 8, 3), np.uint8))
    assert from_pixels.shape == (10,)
    with pytest.raises(DataError, match=r"float64 \(8, 8\) given, uint8 \[H, W, 3\] is wanted"):
        predictor.prepare(np.zeros((8, 8)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not a readable image"):
        predictor.prepare("snippet.py")


@pytest.mark.parametrize(
    "said",
    ["{}", '{"inputs": 3}', '{"inputs": {"dtype": "float16"}}']
    + [
        f'{{"inputs": {{"dtype": "float32", "{key}": {value}}}}}'
        for key, value in (
            ("image_size", "-1"), ("image_size", "1e9"), ("image_size", "true"), ("max_length", "null"), ("pixel_max", "NaN"),
        )
    ],
)  # fmt: skip
def test_a_description_of_inputs_that_is_none(said: str, tmp_path: Path) -> None:
    (tmp_path / "fedsplit.json").write_text(said)
    with pytest.raises(BackboneError, match="does not say how inputs are prepared"):
        module.load_inputs(tmp_path)


def test_the_families_entries_are_those_in_the_code(tmp_path: Path) -> None:
    vit, _, modernbert, _ = snippets("docs/how-to/new-family.md")
    for entry, name in ((vit, "vit"), (modernbert, "modernbert")):
        found = run(f"found = {entry}", tmp_path, **vars(families))["found"]
        assert found == families.FAMILIES[name]


@pytest.mark.parametrize("left", [False, True])
def test_a_decoder_of_the_same_form_is_one_entry(
    left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2, whose every second block sees three tokens back."""
    *_, entry = snippets("docs/how-to/new-family.md")
    known = families.FAMILIES
    qwen2 = run(f"found = {entry}", tmp_path, **vars(families))["found"]
    monkeypatch.setitem(known, "qwen2", qwen2)
    _, _, like_llama = CONFIGS["llama"]
    monkeypatch.setitem(CONFIGS, "qwen2", ("Qwen2Config", "Qwen2Model", like_llama))
    types = [families.FULL, families.SLIDING] * 2
    path = save(tmp_path, "qwen2", use_sliding_window=True, sliding_window=3, layer_types=types)
    compared = Compared(Backbone.find(str(path)), SPECS["lora"], tmp_path / "peft")
    compared.check(make_batch("qwen2", left=left), ("0,4", "1,3"))


def test_the_names_of_a_family(
    tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, names, *_ = snippets("docs/how-to/new-family.md")
    run(names.replace('"DIR"', repr(str(tiny["vit"]))), tmp_path)
    assert "vit.layers.0.attention.q_proj.weight" in capsys.readouterr().out.split()


def test_arrays_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts, crops = snippets("docs/how-to/own-data.md")
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6), dtype=np.uint8)
    labels = np.arange(8) % 2
    run(parts, tmp_path, images=images, labels=labels)
    assert load_source("npz:parts.npz", site="a").classes == ("crack", "fine")
    boards = np.arange(8) // 2
    run(crops, tmp_path, np=np, crops=images, labels=labels, board_of_each_crop=boards)
    groups = load_source("npz:crops.npz", site="a").groups
    assert groups is not None
    assert len(set(groups.tolist())) == 4


def test_the_table_of_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = "docs/explanation/costs.md"
    run(snippets(page)[0], tmp_path)
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(rows) == 3
    assert all(f"| {' | '.join(row)} |" in text for row in rows)
