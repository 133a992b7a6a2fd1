"""Recipes: what they choose on a backbone for so many sites, what they leave as given, and what they say of it."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.core.config import NOT_GIVEN, RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.recipes import RECIPES

FLOWER = dict.fromkeys(RunConfig.keys(), NOT_GIVEN)
"""Flower hands over every key, given or not."""


def settled(recipe: str, blocks: int, sites: int, samples: int, **given: Any) -> RunConfig:
    """As the server settles it: on the backbone first, for the sites at roll call."""
    flat = FLOWER | {k.replace("_", "-"): v for k, v in given.items()} | {"recipe": recipe}
    return RunConfig.from_flat(flat).fitted(blocks).fitted(blocks, sites=sites, samples=samples)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("blocks", "sites", "samples"), [(1, 2, 4), (4, 3, 60), (6, 4, 1437), (12, 20, 480), (24, 1000, 10**6)]
)  # fmt: skip
def test_a_recipe_fits_every_backbone_and_any_sites(
    recipe: str, blocks: int, sites: int, samples: int
) -> None:
    config = settled(recipe, blocks, sites, samples)
    config.check_blocks(blocks)
    # What a run keeps in config.json, and what sites are sent, is read back as it is.
    assert RunConfig.resolved(config.flat()) == config
    assert config.fitted(blocks, sites=sites, samples=samples) == config
    assert config.run.method == RECIPES[recipe].sets["method"]
    assert config.module.classifier_init == "ridge"
    told = config.recipe_told(blocks, sites=sites, samples=samples)
    assert not any("as given" in line for line in told)


def test_what_a_recipe_adapts() -> None:
    boards = settled("shared", 12, 20, 480)
    assert (boards.placement.cut, boards.train.lora_learning_rate, boards.train.rounds) == (
        "0,12",
        0.03,
        8,
    )
    assert settled("shared", 6, 4, 480).train.lora_learning_rate == 0.006
    assert settled("shared", 6, 4, 1437).train.rounds == 4
    assert settled("shared", 6, 4, 60).train.rounds == 16
    # Only those who train in a round share its steps.
    assert settled("shared", 6, 20, 480, participation=0.5).train.lora_learning_rate == 0.015
    full = settled("shared-full", 12, 20, 480)
    assert (full.module.kind, full.module.module_blocks, full.train.lora_learning_rate) == (
        "full",
        12,
        0.003,
    )
    assert [settled("tail", blocks, 4, 99).placement.cut for blocks in (1, 4, 6, 12, 24)] == [
        "0,0", "0,3", "0,5", "0,10", "0,20",
    ]  # fmt: skip
    assert settled("closed-form", 12, 4, 99).train.rounds == 0
    assert settled("personal", 12, 20, 480).train.personalisation == "fed-rod"


def test_what_was_given_wins_and_is_told() -> None:
    config = settled("shared", 12, 20, 480, cut="2,10", lora_learning_rate=0.01, batch_size=4)
    assert (config.placement.cut, config.train.lora_learning_rate, config.train.batch_size) == (
        "2,10",
        0.01,
        4,
    )
    told = config.recipe_told(12, sites=20, samples=480)
    assert "cut=2,10, as given; the recipe has 0,12" in told
    assert "lora-learning-rate=0.01, as given; the recipe has 0.03" in told
    assert "batch-size=4, as given; the recipe has 8" in told


def test_a_default_that_was_given_wins_too() -> None:
    assert settled("shared", 12, 20, 480).train.rounds == 8
    config = settled("shared", 12, 20, 480, rounds=5, cut="1,5")
    assert (config.train.rounds, config.placement.cut) == (5, "1,5")
    told = config.recipe_told(12, sites=20, samples=480)
    assert "rounds=5, as given; the recipe has 8" in told
    assert "cut=1,5, as given; the recipe has 0,12" in told


def test_a_method_that_was_given_is_taken_as_it_is() -> None:
    """The rate of a copy that all sites step would break copies of which each has its own."""
    config = settled("shared", 12, 20, 480, method="fedyolo")
    assert (config.run.method, config.placement.encoder_training) == ("fedyolo", "frozen")
    assert config.train.lora_learning_rate == RunConfig.defaults()["lora-learning-rate"]
    assert (
        settled("shared", 12, 20, 480, encoder_training="hosted").train.lora_learning_rate == 0.0005
    )


def test_before_the_roll_call_the_rate_is_open() -> None:
    config = RunConfig.from_flat({"recipe": "shared"}).fitted(12)
    assert config.placement.cut == "0,12"
    assert config.train.lora_learning_rate == RunConfig.defaults()["lora-learning-rate"]
    assert "rounds: 4 to 16, by the samples that the sites have" in config.recipe_told(12, sites=20)


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'closed-form', 'shared'"):
        RunConfig.from_flat({"recipe": "share"})
