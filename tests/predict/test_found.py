"""Which module is meant, and where its backbone lies: by folder, run, registry, digest; and what is said where neither is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError, ConfigError, RegistryError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.store import BackboneStore
from fedsplit.predict.found import find_module
from fedsplit.predict.predictor import load_predictor
from fedsplit.registry.module_files import module_digest
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from tests.model.copies import copy_of
from tests.model.kinds import LORA, away_from_zero
from tests.model.stores import fill


@pytest.fixture
def elsewhere(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """(module folder, its backbone), and nothing near the module leads to the backbone."""
    backbone = copy_of(tiny["vit"], tmp_path / "far" / "away" / "tiny-vit")
    folder = tmp_path / "a" / "b" / "c" / "d" / "e" / "module"
    found = Backbone.find(str(backbone))
    module.export(folder, found, LORA, away_from_zero(found, LORA))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FEDSPLIT_BACKBONES", raising=False)
    return folder, backbone


def test_a_run_its_module_and_one_of_its_tasks(trained_image_module: Path, tmp_path: Path) -> None:
    of_run = find_module(str(trained_image_module))
    of_folder = find_module(str(trained_image_module / "module"))
    assert (of_run.folder, of_run.digest) == (of_folder.folder, of_folder.digest)
    assert of_run.digest == module_digest(of_run.folder)
    for task in ("surface", "seam"):
        shutil.copytree(trained_image_module / "module", tmp_path / "run" / task / "module")
    assert find_module(str(tmp_path / "run" / "seam")).folder == tmp_path / "run/seam/module"
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"is a run of several tasks; name one of them: .*seam, .*surface"
    ):
        find_module(str(tmp_path / "run"))


def test_references_into_a_registry(
    trained_image_module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained_image_module / "module"
    with ModuleRegistry.open(tmp_path / "kept", create=True) as registry:
        registry.add(folder, Facts(task="digits", run="first"))
        registry.promote("digits#1", by="test")
    digest = module_digest(folder)
    for reference in (
        "digits",
        "digits@production",
        "digits@latest",
        "digits#1",
        digest,
        digest[:8],
    ):
        found = find_module(reference, registry=tmp_path / "kept")
        assert (found.digest, found.name, found.task) == (digest, "digits#1 (production)", "digits")
    predictor = load_predictor("digits", registry=tmp_path / "kept")
    assert predictor.backbone.path.name == "vit-glyphs"
    monkeypatch.setenv("FEDSPLIT_REGISTRY", str(tmp_path / "kept"))
    assert find_module("digits").digest == digest
    monkeypatch.delenv("FEDSPLIT_REGISTRY")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no registry of modules"):
        find_module("digits")
    (tmp_path / "kept").rename(tmp_path / "modules")
    # A folder of the task's name has no module, so the registry's is meant.
    (tmp_path / "digits").mkdir()
    assert find_module("digits").digest == digest
    with pytest.raises(ConfigError, match="there is no module 'bolts'"):
        find_module("bolts")
    about = find_module("digits").folder / "fedsplit.json"
    about.chmod(0o600)
    about.write_text(about.read_text() + " ")
    with pytest.raises(RegistryError, match="were changed"):
        find_module("digits")


def test_a_backbone_that_is_nowhere_is_asked_for(elsewhere: tuple[Path, Path]) -> None:
    folder, backbone = elsewhere
    with pytest.raises(BackboneError) as told:
        load_predictor(folder)
    for part in (
        "'tiny-vit'",
        "vit-glyphs",
        "backbones/",
        "FEDSPLIT_BACKBONES is not set",
        "--backbone",
    ):
        assert part in str(told.value)
    assert load_predictor(folder, backbone=str(backbone)).backbone.path == backbone
    with pytest.raises(
        BackboneError, match=r"trained on backbone 'tiny-vit'.*'vit-glyphs' has digest .* differ"
    ):
        load_predictor(folder, backbone="vit-glyphs")


def test_where_a_backbone_is_looked_for(
    elsewhere: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, backbone = elsewhere
    monkeypatch.setenv("FEDSPLIT_BACKBONES", str(backbone.parent))
    assert load_predictor(folder).backbone.path == backbone
    monkeypatch.delenv("FEDSPLIT_BACKBONES")
    run_config = folder.parent / "config.json"
    run_config.write_text(json.dumps({"config": {"backbone": str(backbone), "task": "t"}}))
    assert load_predictor(folder).backbone.path == backbone
    run_config.unlink()
    federation = folder.parents[1] / "federation.toml"
    federation.write_text(f"[backbone]\npath = {json.dumps(str(backbone))}\n")
    assert load_predictor(folder).backbone.path == backbone
    federation.unlink()
    # As a site keeps it: in parts, by digest.
    blocks = Backbone.find(str(backbone)).blocks
    kept = fill(BackboneStore(folder.parents[2] / "backbones"), backbone, Cut(blocks, blocks))
    predictor = load_predictor(folder)
    assert predictor.backbone.path == kept
    pixels = np.zeros((16, 16, 3), np.uint8)
    whole = load_predictor(folder, backbone=str(backbone))
    assert np.array_equal(
        predictor.outputs([predictor.prepare(pixels)]), whole.outputs([whole.prepare(pixels)])
    )


def test_a_name_in_a_module_leads_to_no_network(
    elsewhere: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = elsewhere
    about = folder / "fedsplit.json"
    said = json.loads(about.read_text())
    for name in ("owner/model", "//host/share/model", "~nobody/x", "a\0b", "x" * 5000, "../../etc"):
        said["backbone"] = {"name": name, "model_type": "vit"}
        about.write_text(json.dumps(said))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(BackboneError, match="was not found"):
            load_predictor(folder)
    for odd in (3, [], {"name": 3}, {"name": None}):
        said["backbone"] = odd
        about.write_text(json.dumps(said))
        with pytest.raises(BackboneError, match=r"not found|does not say"):
            load_predictor(folder)


def test_classes_that_are_not_the_classifiers_are_refused(elsewhere: tuple[Path, Path]) -> None:
    folder, backbone = elsewhere
    about = folder / "fedsplit.json"
    said = json.loads(about.read_text())
    about.write_text(json.dumps(said | {"classes": ["crack", "fine"]}))
    with pytest.raises(
        BackboneError, match=r"its classifier has 4 classes, fedsplit.json names 2 \(crack, fine\)"
    ):
        load_predictor(folder, backbone=str(backbone))
