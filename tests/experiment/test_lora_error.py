"""experiments/lora_error: the error is that of the formulas, zero where there is none, and the program writes it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments import lora_error
from fedsplit.core.aggregation import Update
from fedsplit.core.lora_rules import rule_of

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def updates(rng: np.random.Generator, *, of: tuple[str, ...] = (A, B)) -> list[Update]:
    shapes = {A: (2, 5), B: (4, 2)}
    return [
        Update(
            site=f"site-{i}",
            samples=i + 1,
            delta={n: rng.standard_normal(shapes[n]).astype(np.float32) for n in of},
        )
        for i in range(3)
    ]


def combined_by(name: str, found: list[Update], rng: np.random.Generator) -> float:
    module = {
        A: rng.standard_normal((2, 5)).astype(np.float32),
        B: rng.standard_normal((4, 2)).astype(np.float32),
    }
    received = {u.site: module for u in found}
    combined = rule_of(name, scale=1.0, seed=0).aggregate(module, found, received, 1)
    return lora_error.error_of(combined, found, received)


def test_the_error_is_what_the_formula_says() -> None:
    rng = np.random.default_rng(0)
    found = updates(rng)
    start = {A: np.zeros((2, 5), np.float32), B: np.zeros((4, 2), np.float32)}
    received = {u.site: start for u in found}
    combined = rule_of("plain", scale=1.0, seed=0).aggregate(start, found, received, 1)
    weights = [1 / 6, 2 / 6, 3 / 6]
    wanted = sum(w * (u.delta[B] @ u.delta[A]) for w, u in zip(weights, found, strict=True))
    made = combined[B] @ combined[A]
    by_hand = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert lora_error.error_of(combined, found, received) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0.1


def test_exact_rules_and_sites_alike_have_none() -> None:
    rng = np.random.default_rng(1)
    assert combined_by("ffa", updates(rng, of=(B,)), rng) < 1e-6
    assert combined_by("rolora", updates(rng, of=(B,)), rng) < 1e-6
    one = updates(rng)[:1]
    assert combined_by("plain", one, rng) < 1e-6
    assert combined_by("plain", updates(rng), rng) > 0.01


def test_the_program_writes_a_row_a_round(text: Callable[..., str], tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    methods = "".join(
        f'[[methods]]\nname = "{name}"\nmethod = "fedv"\nrounds = 2\nlora-aggregation = "{name}"\n'
        for name in ("plain", "flora")
    )
    grid.write_text(text(methods))
    assert lora_error.main(["--grid", str(grid), "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out" / "lora-error.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [(r["method"], r["round"]) for r in rows] == [("plain", "1"), ("plain", "2")]
    assert all(0 < float(r["error"]) < 1 for r in rows)
    assert "| plain |" in (tmp_path / "out" / "lora-error.md").read_text()


def test_a_grid_with_faults_is_told(
    text: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(text('[[methods]]\nname = "x"\nmethod = "fedw"\n'))
    assert lora_error.main(["--grid", str(grid), "--out", str(tmp_path)]) == 1
    assert "fedw" in capsys.readouterr().err
