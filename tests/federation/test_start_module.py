"""A run that starts from an earlier one's module, with classes that came or went."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedsplit.core.errors import ConfigError
from fedsplit.core.records import Summary
from fedsplit.federation.server.start_module import StartModule
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from tests.federation.conftest import prepared, settings

LAST = ("classifier.weight", "classifier.bias")


def site(folder: Path, name: str, classes: str) -> dict[str, Any]:
    """A site with 12 scans of each of these digits, called by letters."""
    digits = load_digits()
    keep = np.concatenate(
        [np.flatnonzero(digits.target == ord(c) - ord("a"))[:12] for c in classes]
    )
    path = folder / f"{name}-{classes}.npz"
    names = np.array([chr(ord("a") + label) for label in digits.target[keep]])
    np.savez(path, x=(digits.images[keep] / 16).astype(np.float32), y=names)
    return {"site": name, "data": f"npz:{path}"}


def go(folder: Path, name: str, sites: dict[str, str], **other: Any) -> Summary:
    nodes = [site(folder, *entry) for entry in sites.items()]
    config = settings(folder / "runs", run_name=name, cut="0,6", max_samples=0, **other)
    with prepared(config, nodes) as (run, _):
        return run.go()


def rows(folder: Path, name: str) -> dict[str, np.ndarray]:
    """class -> row of the classifier, its bias last."""
    spec, tensors = module.load_exported(folder / "runs" / name / "module")
    weight, bias = (tensors[n] for n in LAST)
    return {c: np.append(weight[i], bias[i]) for i, c in enumerate(spec.classes)}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the classes b, c and d."""
    folder = tmp_path_factory.mktemp("first")
    go(folder, "first", {"line-a": "bc", "line-b": "cd"}, rounds=1)
    return folder


def after(first: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(first / "runs" / "first" / "module", tmp_path / "earlier")
    return {"start_module": str(tmp_path / "earlier"), "rounds": 1}


def test_a_new_class_resets_nothing(first: Path, tmp_path: Path) -> None:
    """Class a sorts in front of all known ones, and class b is at no site any more."""
    old = rows(first, "first")
    # Nothing moves, so that what the run ends with is what it started from.
    still = after(first, tmp_path) | {"learning_rate": 1e-30, "lora_learning_rate": 1e-30}
    ended = go(tmp_path, "next", {"line-a": "ac", "line-b": "cd"}, **still)
    new = rows(tmp_path, "next")
    assert list(new) == ["a", "b", "c", "d"]
    for name in "bcd":
        np.testing.assert_allclose(new[name], old[name], rtol=0, atol=1e-20)
    assert np.abs(old["b"]).max() > 0
    assert np.abs(new["a"]).max() < 1e-20
    assert ended.notes == (
        "class 'a' is new to the start-module (at line-a): its row of the classifier starts anew",
        "no site has a sample of class b: known from the start-module and kept in the classifier",
    )
    saved = json.loads((tmp_path / "runs" / "next" / "summary.json").read_text())
    assert saved["notes"] == list(ended.notes)


@pytest.mark.parametrize("init", ["ridge", "class-means"])
def test_a_closed_form_fills_the_new_rows_alone(init: str, first: Path, tmp_path: Path) -> None:
    old = rows(first, "first")
    still = after(first, tmp_path) | {"learning_rate": 1e-30, "lora_learning_rate": 1e-30}
    go(tmp_path, "next", {"line-a": "ac", "line-b": "cd"}, classifier_init=init, **still)
    new = rows(tmp_path, "next")
    for name in "bcd":
        np.testing.assert_allclose(new[name], old[name], rtol=0, atol=1e-20)
    assert np.abs(new["a"]).max() > 0


def test_the_same_classes_are_told_nothing(first: Path, tmp_path: Path) -> None:
    ended = go(tmp_path, "next", {"line-a": "bc", "line-b": "cd"}, **after(first, tmp_path))
    assert ended.notes == ()
    assert list(rows(tmp_path, "next")) == ["b", "c", "d"]


def test_declared_classes_decide(first: Path, tmp_path: Path) -> None:
    start = after(first, tmp_path)
    ended = go(tmp_path, "next", {"line-a": "cd", "line-b": "cd"}, classes="d,c", **start)
    assert ended.notes == ("class b of the start-module: not in classes and left out",)
    assert list(rows(tmp_path, "next")) == ["d", "c"]


def test_another_shape_is_refused_before_any_site_is_asked(first: Path, tmp_path: Path) -> None:
    start = after(first, tmp_path)
    with pytest.raises(ConfigError, match=r"lacks .*lora_A.* at shape .*use the rank"):
        go(tmp_path, "next", {"line-a": "bc", "line-b": "cd"}, lora_rank=4, **start)
    with pytest.raises(ConfigError, match="holds module=lora, the run trains module=prompt"):
        go(tmp_path, "other", {"line-a": "bc"}, module="prompt", min_sites=1, **start)


def test_every_kind_of_classifier_keeps_its_rows(tiny: dict[str, Path], tmp_path: Path) -> None:
    """RoBERTa's and DistilBERT's have a layer in front of the last one, which has no rows of classes."""
    for family, path in tiny.items():
        backbone = Backbone.find(str(path))
        for kind in ("lora", "prompt", "adapter", "classifier", "full"):
            config = settings(
                tmp_path, module=kind, start_module=str(tmp_path / f"{family}-{kind}")
            )
            known = module.ModuleSpec.of(config.module, ("b", "c"))
            draw = np.random.default_rng(0)
            tensors = {
                n: draw.normal(size=s).astype(np.float32)
                for n, s in module.shapes(backbone, known).items()
            }
            module.export(Path(config.run.start_module), backbone, known, tensors)
            start = StartModule.read(config, backbone)
            assert start is not None
            spec = module.ModuleSpec.of(config.module, start.classes(["a", "c"]))
            assert spec.classes == ("a", "b", "c")
            now = start.onto(module.initial(backbone, spec, seed=0), spec)
            last = module.final_linear(backbone, spec)
            for name, value in now.items():
                at = value[1:] if name in last else value
                assert np.array_equal(at, tensors[name]), (family, kind, name)
                assert name not in last or not value[0].any()


def test_a_resumed_run_keeps_its_classes(tmp_path: Path) -> None:
    """The one site with class d is away when the run goes on."""
    nodes = [site(tmp_path, "line-a", "bc"), site(tmp_path, "line-b", "bcd")]
    base = {"cut": "0,6", "max_samples": 0, "min_sites": 1, "run_name": "run"}
    with prepared(settings(tmp_path, rounds=1, **base), nodes) as (run, _):
        run.go()
    config = tmp_path / "run" / "config.json"
    longer = json.loads(config.read_text())
    longer["config"]["rounds"] = 2
    config.write_text(json.dumps(longer))
    from fedsplit.federation.server.run import settle

    again = settle(settings(tmp_path, rounds=2, **base | {"run_name": "", "resume": "run"}))
    with prepared(again, nodes[:1]) as (run, _):
        run.go()
    spec, _ = module.load_exported(tmp_path / "run" / "module")
    assert spec.classes == ("b", "c", "d")
