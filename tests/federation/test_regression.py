"""A whole run on numbers: it learns, tells no accuracy, keeps its scale, and ridge is that of all samples in one place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common.logger import LOGGER_NAME
from PIL import Image

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.records import Summary
from fedsplit.federation.server.run import Run, settle
from fedsplit.model.backbone import Backbone
from fedsplit.model.split import whole_model
from fedsplit.predict.predictor import load_predictor
from fedsplit.report.plots import write_plots
from fedsplit.training.last_linear import LastInput
from fedsplit.training.site_data import SiteSources
from fedsplit.training.site_settings import SiteSettings
from tests.federation.conftest import prepared, settings, simulated
from tests.report.test_tables import shown

WEAR = 40.0


@pytest.fixture
def nodes(tmp_path: Path) -> list[dict[str, Any]]:
    """Two sites with images of a bar; its length is a wear of 100 to 100 + WEAR, which their tables name."""
    rng, nodes = np.random.default_rng(0), []
    for name in ("line-a", "line-b"):
        folder = tmp_path / name
        folder.mkdir()
        rows = ["file,wear"]
        for i in range(40):
            length = int(rng.integers(2, 30))
            pixels = np.zeros((32, 32), np.uint8)
            pixels[8 + i % 16 : 11 + i % 16, :length] = 255
            Image.fromarray(pixels).save(folder / f"{i}.png")
            rows.append(f"{i}.png,{100 + WEAR * length / 30:.3f}")
        (folder / "labels.csv").write_text("\n".join(rows))
        nodes.append({"site": name, "data": f"folder:{folder}", "label-column": "wear"})
    return nodes


def finished(config: RunConfig, nodes: list[dict[str, Any]], **other: Any) -> tuple[Run, Summary]:
    with prepared(config, nodes, **other) as (run, _):
        return run, run.go()


def test_sites_learn_a_number_of_their_images(
    nodes: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = tmp_path / "runs"
    config = settings(runs, target="number", label_column="wear", classifier_init="auto")
    logging.getLogger(LOGGER_NAME).addHandler(caplog.handler)
    try:
        with caplog.at_level("INFO", logger=LOGGER_NAME):
            run, summary = finished(config, nodes, in_simulation=False)
    finally:
        logging.getLogger(LOGGER_NAME).removeHandler(caplog.handler)
    assert summary.outcome == "complete"
    assert summary.scores is not None
    scale = run.summary and json.loads((runs / "run" / "config.json").read_text())["scale"]
    assert scale["deviation"] == pytest.approx(WEAR * 28 / 30 / 12**0.5, rel=0.2)
    assert summary.scores["mae"] < 0.3 * scale["deviation"]
    assert summary.scores["r2"] > 0.8
    assert all(site.scores and site.scores_before for site in summary.sites)
    # A site's own people read what leaves it.
    assert "tells the server of the numbers of its 32 training samples: mean" in caplog.text

    written = json.loads((runs / "run" / "summary.json").read_text())
    assert written["accuracy_global"] is None
    assert written["scores"] == summary.scores
    assert Summary.model_validate(written) == summary
    names = {path.name for path in write_plots(runs / "run")}
    assert names == {"mae.png", "mae.svg", "traffic.png", "traffic.svg"}
    text = shown(summary, width=160)
    assert "MAE on each site's own test samples" in text
    assert "R2" in text
    assert "ccuracy" not in text + (runs / "run" / "mae.svg").read_text()

    trained = load_predictor(runs / "run")
    told = (tmp_path / "line-a" / "labels.csv").read_text().splitlines()[1:]
    errors = []
    for row in told:
        name, number = row.split(",")
        errors.append(trained.predict(tmp_path / "line-a" / name)["number"] - float(number))
    assert np.abs(errors).mean() < 0.3 * scale["deviation"]


def test_ridge_over_sites_predicts_as_ridge_of_all_samples_in_one_place(tmp_path: Path) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    config = settings(
        tmp_path, method="closed-form", rounds=0, target="number", partition="quantity:0.5"
    )
    run, summary = finished(config, simulated(3))
    assert summary.scores is not None

    backbone, sources = Backbone.find(config.placement.backbone), SiteSources()
    model = whole_model(backbone, run._strategy.spec, run._strategy.module)  # type: ignore[union-attr]
    x: dict[str, list[Any]] = {"train": [], "test": []}
    y: dict[str, list[Any]] = {"train": [], "test": []}
    for node in simulated(3):
        site = SiteSettings.from_node(node, node_id=0).for_task(config)
        assert site is not None
        own = sources.open(config, site, backbone, None)
        assert own.examples.numbers is not None
        for side, chosen in (("train", own.train), ("test", own.test)):
            batch = own.transform.collate(own.examples, chosen.tolist())
            with torch.no_grad(), LastInput(model.part) as seen:
                model(batch.inputs, None)
                x[side].append(seen.features.numpy().astype(np.float64))
            y[side].append(own.examples.numbers[chosen])
    features, numbers = np.concatenate(x["train"]), np.concatenate(y["train"])
    alpha = config.module.ridge_lambda * features.var(axis=0).mean()
    pooled = linear_model.Ridge(alpha).fit(features, numbers)
    errors = pooled.predict(np.concatenate(x["test"])) - np.concatenate(y["test"])
    assert summary.scores["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-3)
    assert summary.scores["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)


def test_a_resumed_run_keeps_its_scale_and_its_best(tmp_path: Path) -> None:
    def lost(node: int, message: Message) -> bool:
        return message.metadata.group_id == "2" and node == 1

    common: dict[str, Any] = {"target": "number", "max_samples": 80, "early_stop_rounds": 2}
    _, whole = finished(settings(tmp_path, run_name="whole", **common), simulated(2))
    broken = settings(tmp_path, run_name="broken", deadline_s=3.0, **common)
    with pytest.raises(FederationError, match="resume=broken"):
        finished(broken, simulated(2), silent=lost)
    _, resumed = finished(settle(settings(tmp_path, run_name="", resume="broken")), simulated(2))
    assert resumed.scores_by_round == whole.scores_by_round


def test_a_run_on_numbers_goes_on_from_an_earlier_module_on_its_scale(
    nodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"target": "number", "label_column": "wear"}
    first = settings(tmp_path / "a", method="closed-form", rounds=0, **common)
    _, before = finished(first, nodes)
    module = str(tmp_path / "a" / "run" / "module")
    # One site alone has another mean; the earlier classifier's numbers must not move with it.
    second = settings(
        tmp_path / "b", start_module=module, module="classifier", min_sites=1, rounds=1, **common
    )
    _, after = finished(second, nodes[:1])
    assert after.scores_start == pytest.approx(before.sites[0].scores, rel=1e-4)
    with pytest.raises(
        ConfigError, match="trained on target=number, the run trains on target=class"
    ):
        finished(settings(tmp_path / "c", start_module=module, module="classifier"), nodes)


def test_a_site_with_names_in_its_label_column_takes_no_part(
    nodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    table = Path(str(nodes[0]["data"]).removeprefix("folder:")) / "labels.csv"
    table.write_text(table.read_text().replace(",wear", ",wear", 1) + "\n0.png,crack")
    config = settings(tmp_path, target="number", label_column="wear")
    with pytest.raises(FederationError, match=r"labels.csv:42: the label 'crack' is no number"):
        finished(config, nodes)


def test_a_site_that_lets_its_classes_leave_alone_takes_no_part(
    nodes: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = settings(tmp_path, target="number", label_column="wear")
    with pytest.raises(
        FederationError, match="this site's node config lets only its classes leave"
    ):
        finished(config, [node | {"classes": "fine,worn"} for node in nodes])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": "a,b"}, "a number has no class"),
        ({"partition": "dirichlet:1"}, "partition=dirichlet:1 deals by class"),
        ({"partition": "pathological:2"}, "deals by class"),
        ({"label-smoothing": 0.1}, "spreads a label over classes"),
        ({"method": "fed-rod"}, "use method=ditto"),
        ({"recipe": "personal"}, "recipe=personal is made for classes"),
        ({"method": "one-vs-all-probe"}, "method=one-vs-all-probe means loss=one-vs-all, which is for classes"),
        ({"loss": "balanced-softmax"}, "use loss=squared or huber"),
        ({"classifier-init": "class-means"}, "class-means is for classes"),
        ({"tasks": "a=digits;b=digits"}, "tasks with target=number is not offered"),
    ],
)  # fmt: skip
def test_what_is_for_classes_is_refused_before_the_start(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat({"target": "number"} | change)


def test_what_is_open_fits_numbers() -> None:
    config = RunConfig.from_flat({"target": "number"})
    assert (config.task.partition, config.train.loss, config.module.calibrate) == (
        "iid", "squared", False,
    )  # fmt: skip
    for more in ({"recipe": "tail"}, {"recipe": "shared"}, {"method": "ditto"}, {"loss": "huber"}):
        RunConfig.from_flat({"target": "number"} | more)
    with pytest.raises(ConfigError, match="loss=huber is for numbers"):
        RunConfig.from_flat({"loss": "huber"})
