"""docs/reference/methods.md is what scripts/methods_reference.py makes of METHODS."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fedsplit.core.config import RunConfig
from fedsplit.core.methods import METHODS
from fedsplit.core.recipes import RECIPES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "methods_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    page: Path = script.PAGE
    wanted: str = script.page()
    assert page.read_text(encoding="utf-8") == wanted, "run: python scripts/methods_reference.py"


def test_the_page_has_a_section_a_method(script: ModuleType) -> None:
    titles = re.findall(r"^## `(.+)`$", script.page(), re.MULTILINE)
    assert titles == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_section_names_the_settings_that_make_the_method(script: ModuleType, name: str) -> None:
    method = METHODS[name]
    section = "\n".join(script.section(name, method))
    settled = RunConfig.from_flat({"method": name}).flat()
    for key in (*method.fixes, *method.prefers):
        assert f"`{key}={script.text(settled[key])}`" in section
    for key, values in method.one_of.items():
        assert all(f"`{script.text(value)}`" in section.split(f"`{key}`", 1)[1] for value in values)


def test_every_recipe_is_on_the_page(script: ModuleType) -> None:
    text = script.page()
    for name, recipe in RECIPES.items():
        assert f"| `{name}` | {recipe.summary} | {script.pairs(recipe.sets)} |" in text


def test_every_method_has_a_row_in_the_comparison() -> None:
    text = (ROOT / "docs" / "explanation" / "methods.md").read_text(encoding="utf-8")
    matrix = text.split("## The matrix", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", matrix, re.MULTILINE)
    assert rows == list(METHODS)
