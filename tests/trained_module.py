"""Runs that left a trained module, made once for the whole suite: as people have them, in seconds.

`trained_image_module`: the bundled backbone on scikit-learn's digits. `trained_text_module`: a tiny BERT on a CSV file of
texts. Both are the run's folder: `module/`, `summary.json`, `metrics.jsonl`, `config.json`. Copy one before changing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TEXTS = (
    ("pump leaks oil", "pump"),
    ("oil leaks", "pump"),
    ("belt 3", "belt"),
    ("belts belt", "belt"),
    ("ポンプ oil", "pump"),
    ("3 belts 3 belt", "belt"),
)


@pytest.fixture(scope="session")
def trained_image_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two sites on digits: LoRA and a classifier solved in closed form."""
    folder = tmp_path_factory.mktemp("image-run")
    return _run(
        folder, task="digits", max_samples=400, rounds=1, cut="1,5;6,6", classifier_init="auto"
    )


@pytest.fixture(scope="session")
def trained_text_module(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Path]) -> Path:
    """The folder of a run of two sites on short texts; beside it `texts.csv`, and the backbone in `backbones/bert`."""
    from tests.model.copies import add_tokenizer, copy_of

    folder = tmp_path_factory.mktemp("text-run")
    backbone = add_tokenizer(copy_of(tiny["bert"], folder / "backbones" / "bert"))
    rows = [f"{text},{label}" for text, label in TEXTS * 8]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return _run(
        folder, task="orders", data=f"csv:{folder / 'texts.csv'}", backbone=str(backbone), rounds=1, cut="1,3;4,4",
        max_length=16, classifier_init="auto",
    )  # fmt: skip


def _run(folder: Path, **settings: Any) -> Path:
    from tests.federation import conftest as federation

    config = federation.settings(folder / "runs", **settings)
    with _as_a_test(), federation.prepared(config, federation.simulated(2)) as (run, _):
        assert run.go().outcome == "complete"
    return folder / "runs" / "run"


@contextmanager
def _as_a_test() -> Iterator[None]:
    """One thread, as every test has: a fixture of the session begins before that is set."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
