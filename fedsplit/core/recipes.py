"""Recipes: the recommended settings under one name, adapted to the backbone and the sites.

A recipe has settings that never change, which are applied when settings are read, and some that depend on what is only
known later: the cut on the backbone's blocks, the rate of a shared encoder on the number of sites, its rounds on their
samples. Those are fitted by `RunConfig.fitted`, by the command line to show them and by the server to run by them.
What was given wins. docs/how-to/choose-a-method.md says when to take which, and docs/results.md where the numbers come
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsplit.core.methods import METHODS, Value

if TYPE_CHECKING:
    from fedsplit.core.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe."""

    summary: str
    """What it is for, in a sentence or two."""
    sets: Mapping[str, Value]
    """Key -> value, on every backbone and for all sites; `method` among them."""
    tail_of: int = 0
    """The device runs the last one of so many parts of the blocks, the server the rest; 0: the server runs all."""
    every_block: bool = False
    """The module is of every block, which leaves the embeddings out of a full one."""
    step_rate: float = 0.0
    """`lora-learning-rate` of one step. A site's step counts by its share of the samples, so times the number of sites."""
    steps: int = 0
    """Steps of all sites in the whole run, which settle the rounds."""


# From docs/results: 20 sites, batches of 8, rates of 0.03 and 0.003, 8 rounds of some 60 steps.
_STEPS, _FEWEST_ROUNDS, _MOST_ROUNDS = 480, 4, 16
_SHARED: Mapping[str, Value] = {
    "encoder-training": "shared",
    "classifier-init": "ridge",
    "classifier-training": "fixed",
    "batch-size": 8,
}

RECIPES: dict[str, Recipe] = {
    "closed-form": Recipe(
        summary="One round of ridge regression on frozen features. It shows what they are worth; nothing is trained.",
        sets={"method": "closed-form"},
    ),
    "shared": Recipe(
        summary=(
            "One encoder at the server. The gradients of all sites step its LoRA in turn; the ridge classifier is "
            "fixed. The device holds embeddings and classifier. Gradients go up."
        ),
        sets={"method": "fedv", "module": "lora", **_SHARED},
        step_rate=0.0015,
        steps=_STEPS,
    ),
    "shared-full": Recipe(
        summary="The same with all weights of the encoder, for tasks and texts that the backbone hardly knows.",
        sets={"method": "fedv", "module": "full", **_SHARED},
        every_block=True,
        step_rate=0.00015,
        steps=_STEPS,
    ),
    "tail": Recipe(
        summary=(
            "The device trains LoRA of the last sixth of the blocks, and the classifier from a ridge start. The encoder "
            "is frozen. The site keeps its answers and sends no gradient."
        ),
        sets={
            "method": "fedv",
            "classifier-init": "ridge",
            "loss": "balanced-softmax",
            "cache-activations": True,
            "batch-size": 8,
            "learning-rate": 0.003,
            "lora-learning-rate": 0.003,
            "rounds": 8,
        },
        tail_of=6,
    ),
    "personal": Recipe(
        summary="As shared, and each site also keeps its own classifier: for sites that differ.",
        sets={"method": "fed-rod", "module": "lora", **_SHARED},
        step_rate=0.0015,
        steps=_STEPS,
    ),
}  # fmt: skip


def apply(given: Mapping[str, Value]) -> dict[str, Value]:
    """What was given, with what its recipe sets on any backbone where it was not given."""
    recipe = RECIPES.get(str(given.get("recipe", "")))
    if recipe is None:
        return dict(given)
    # A recipe's loss is one of classes; of numbers the default is what it wants.
    left_out = {"loss"} if given.get("target") == "number" else set()
    settled = {k: v for k, v in recipe.sets.items() if k not in left_out} | dict(given)
    name = settled["method"]
    method = METHODS.get(str(name))
    if method is not None and name != recipe.sets["method"]:
        # A method that was given is taken as it is.
        for key in (settled.keys() - given.keys()) & (method.fixes.keys() | method.one_of.keys()):
            del settled[key]
    return settled


def fitted(
    config: RunConfig, *, blocks: int, sites: int, samples: int
) -> dict[str, tuple[Value, str]]:
    """Key -> (value, why) of what the config's recipe adapts, as far as it is known; 0 stands for not known."""
    recipe, found = RECIPES[config.run.recipe], dict[str, tuple[Value, str]]()
    trains = max(config.server.selected(sites), 1) if sites else 0
    if config.run.method_description.placement != "device":
        b = blocks - max(1, round(blocks / recipe.tail_of)) if recipe.tail_of else blocks
        found["cut"] = f"0,{b}", f"{b} of the backbone's {blocks} blocks at the server"
    if recipe.every_block:
        found["module-blocks"] = blocks, "every block, without the embeddings"
    if config.placement.encoder_training != "shared":
        return found  # what follows is of one copy that all sites step
    if recipe.step_rate and trains:
        rate = float(f"{recipe.step_rate * trains:.6g}")
        found["lora-learning-rate"] = rate, f"{recipe.step_rate:g} a step, for {trains} sites"
    if recipe.steps and samples:
        steps = max(1, samples * trains // max(sites, 1) // config.train.batch_size)
        rounds = min(max(round(recipe.steps / steps), _FEWEST_ROUNDS), _MOST_ROUNDS)
        found["rounds"] = rounds, f"about {steps} steps a round"
    return found


def changes(config: RunConfig, found: Mapping[str, tuple[Value, str]]) -> dict[str, Value]:
    """Those of the fitted values that nobody has given."""
    return {key: value for key, (value, _) in found.items() if key not in config.given}


def told(config: RunConfig, found: Mapping[str, tuple[Value, str]]) -> list[str]:
    """What the recipe of a fitted config chose and what it left as given, a line each."""
    recipe, flat = RECIPES[config.run.recipe], config.flat()
    sets = {k: v for k, v in recipe.sets.items() if k != "loss" or config.task.target == "class"}
    wanted = {key: (value, "") for key, value in sets.items()} | dict(found)
    lines = []
    for key, (value, why) in wanted.items():
        if flat[key] == value:
            lines.append(f"{key}={_text(value)}{f' ({why})' if why else ''}")
        else:
            lines.append(f"{key}={_text(flat[key])}, as given; the recipe has {_text(value)}")
    later = {
        "lora-learning-rate": f"{recipe.step_rate:g} for each site that trains in a round",
        "rounds": f"{_FEWEST_ROUNDS} to {_MOST_ROUNDS}, by the samples that the sites have",
    }
    for key in (
        sorted(later.keys() - found.keys()) if config.placement.encoder_training == "shared" else ()
    ):
        as_given = f"={_text(flat[key])}, as given; the recipe has"
        lines.append(f"{key}{as_given if key in config.given else ':'} {later[key]}")
    return lines


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
