"""docs/reference/config.md is what scripts/config_reference.py makes of RunConfig."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fedsplit.core.config import SECTIONS, RunConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "config_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_has_a_meaning(script: ModuleType) -> None:
    for section in SECTIONS.values():
        missing = sorted(section.model_fields.keys() - script.meanings(section).keys())
        assert not missing, f"give these fields a line of prose below them: {missing}"


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    page: Path = script.PAGE
    wanted: str = script.page()
    assert page.read_text(encoding="utf-8") == wanted, "run: python scripts/config_reference.py"


def test_the_page_has_a_row_a_key(script: ModuleType) -> None:
    rows = [line for line in script.page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(RunConfig.keys())
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
