"""Methods are settings: each resolves, says what contradicts it, and survives Flower's round trip."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest

import fedsplit
from fedsplit.core.config import FIELDS, RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.core.methods import METHODS

PACKAGE = Path(fedsplit.__file__).parent
EXTRA: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves_from_its_name_alone(name: str) -> None:
    config = RunConfig.from_flat({"method": name} | EXTRA.get(name, {}))
    flat = config.flat()
    assert all(flat[key] == value for key, value in METHODS[name].fixes.items())
    # Flower hands all keys back, resolved ones too.
    assert RunConfig.resolved(flat) == config
    assert METHODS[name].summary.endswith(".")
    assert METHODS[name].source


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_a_method_is_a_setting(name: str) -> None:
    method = METHODS[name]
    assert {*method.fixes, *method.prefers, *method.one_of} <= set(RunConfig.keys())


def _others(key: str, value: Any) -> list[Any]:
    """Values of a key that are not this one; its default among them, where that is another."""
    kind, default = FIELDS[key].field.annotation, RunConfig.defaults()[key]
    if kind is bool:
        return [not value]
    numbers = [value + 1] if kind is int else []
    return [v for v in (*get_args(kind), *numbers, default) if v not in (value, "auto")]


@pytest.mark.parametrize("name", METHODS)
def test_what_was_given_and_a_method_would_overrule_is_refused(name: str) -> None:
    """Also at the key's default, which somebody may want as much as another value."""
    for key, value in METHODS[name].fixes.items():
        for other in _others(key, value):
            with pytest.raises(ConfigError) as caught:
                RunConfig.from_flat({"method": name, key: other})
            said = f"{key}={str(other).lower()}: method={name} means {key}={str(value).lower()}; leave {key} out, or"
            assert f"{said} choose another method" in str(caught.value)
    if METHODS[name].placement == "device":
        with pytest.raises(ConfigError, match=r"cut=1,5: .* leave cut out"):
            RunConfig.from_flat({"method": name, "cut": "1,5"})


@pytest.mark.parametrize("name", METHODS)
def test_a_default_that_was_given_is_taken_or_refused(name: str) -> None:
    method = METHODS[name]
    for key in {*method.prefers, *method.one_of}:
        default = RunConfig.defaults()[key]
        if key in method.one_of and default not in (*method.one_of[key], "auto"):
            with pytest.raises(ConfigError, match=f"{key}={default} does not fit"):
                RunConfig.from_flat({"method": name, key: default})
        elif (name, key) != ("fedvz-device", "optimizer"):  # refused: zeroth order steps by SGD
            taken = RunConfig.from_flat({"method": name, key: default}).flat()[key]
            assert default in (taken, "auto")


def test_no_other_file_asks_for_a_method_by_its_name() -> None:
    """What a method does differently is a property of its description. Recipes name the method that they set."""
    other_words = {
        "closed-form",
        "local-only",
        "ditto",
        "fed-rod",
    }  # a recipe, an order, personal models
    own = {PACKAGE / "core" / "methods.py", PACKAGE / "core" / "recipes.py"}
    for path in sorted({*PACKAGE.rglob("*.py")} - own):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not texts & (METHODS.keys() - other_words), path


def test_a_device_method_runs_every_block_on_the_device() -> None:
    assert RunConfig.from_flat({"method": "fedyolo"}).cuts_on(12) == (Cut(12, 12),)
    assert RunConfig.from_flat({"method": "fedv"}).cuts_on(6) == (Cut(1, 5),)
    # The default cut, which such a method does not use, need not fit.
    RunConfig.from_flat({"method": "fedyolo"}).check_blocks(4)
    with pytest.raises(ConfigError, match="cut 1,5 does not fit the backbone: it has 4 blocks"):
        RunConfig.from_flat({"method": "fedv"}).check_blocks(4)


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"method": "fedvv"}, "did you mean 'fedv'?"),
        ({"method": "fedyolo", "cut": "0,5"}, "cut=0,5: method=fedyolo runs the whole model on the device"),
        ({"method": "fedyolo", "module": "full"}, "module=full does not fit method=fedyolo; use one of lora"),
        ({"method": "fedavg-full", "module": "adapter"}, "module=adapter: method=fedavg-full means module=full"),
        ({"method": "festa", "cut": "3,3"}, "cut=3,3 leaves nothing on the server"),
        ({"method": "fedvz", "encoder-training": "shared"}, "encoder-training=shared: method=fedvz means"),
        ({"method": "fedvz", "device-training": "head+tail"}, "device-training=head+tail: method=fedvz means"),
        ({"module": "prompt", "encoder-training": "hosted"}, "none of it is on the server"),
        ({"lora-ranks": "4;16"}, "16 is more than lora-rank=8"),
        ({"lora-ranks": "4;x"}, "are not ranks; use e.g. 4;8;16"),
        ({"robust-rule": "krum", "sites": 4, "byzantine-sites": 1}, "needs 5 sites a round, 4 train"),
        ({"robust-rule": "trimmed-mean"}, "trims nobody"),
        ({"encoder-training": "shared", "cut": "1,5;2,4"}, "wants one cut for all"),
        ({"encoder-training": "hosted", "accumulate": 2}, "steps at every batch"),
        ({"server-optimizer": "adam", "lora-aggregation": "flora"}, "nothing to step along"),
        ({"robust-rule": "krum", "lora-aggregation": "flexlora"}, "judges tensors"),
        ({"sites": 10, "participation": 0.01}, "participation=0.01 of sites=10 selects nobody"),
        ({"sites": 10, "participation": 0.1}, "selects 1 a round, min-sites=2 are wanted"),
        ({"classifier-training": "fixed", "classifier-init": "zero"}, "never tells classes apart"),
        ({"rounds": 0, "robust-rule": "median"}, "rounds=0 trains nothing"),
        ({"warmup-rounds": 5}, "warmup-rounds=5 leaves none of rounds=5"),
        ({"method": "fedprox", "gradient": "zeroth-order"}, "steps by SGD, optimizer=adamw"),
        ({"cache-activations": True, "augmentation": "flip"}, "use one of them"),
        ({"method": "fedvz-device", "keep-hardest": 0.5}, "keep-hardest=0.5: gradient=zeroth-order is replayed"),
        ({"method": "fedyolo", "local-loss-epochs": 1}, "there is no encoder to leave out; use local-epochs"),
        ({"local-loss-epochs": 1, "encoder-training": "hosted"}, "local-loss-epochs=1 is for a frozen encoder"),
        ({"prompt-depth": "all"}, "prompt-depth=all is for module=prompt, not module=lora"),
        ({"block-sampling": 1}, "draws blocks of an encoder that trains by gradients, not of encoder-training=frozen"),
        ({"method": "fedvz", "block-sampling": 1}, "not of encoder-training=zeroth-order; use hosted or shared"),
        ({"module": "prompt", "module-blocks": 2}, "module-blocks=2 is for module=lora, adapter or full"),
        ({"site-local": "classifier", "lora-aggregation": "flora"}, "use plain"),
        ({"encoder-training": "hosted", "cut": "3,3"}, "nothing runs on the server"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_to_do(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat)
    assert said in str(caught.value)


def test_faults_of_the_method_and_of_the_fields_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat({"method": "fedyolo", "module": "full", "rounds": "many", "x": 1})
    assert str(caught.value).count("\n  - ") == 3


def test_the_learning_rate_rises_then_falls() -> None:
    config = RunConfig.from_flat({"rounds": 6, "warmup-rounds": 2})
    factors = [config.train.learning_rate_factor(r) for r in range(1, 7)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] > 0
    assert RunConfig.of(rounds=4).train.learning_rate_factor(1) == 1.0


def test_the_last_round_always_syncs() -> None:
    config = RunConfig.from_flat({"rounds": 5, "sync-every": 2})
    assert [config.train.syncs(r) for r in range(1, 6)] == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("flat", "start"),
    [
        ({}, "ridge"),
        ({"method": "fedyolo"}, "ridge"),
        ({"method": "fedavg-full"}, "zero"),
        # What is given wins over a method's preference, though ridge is what others get by default.
        ({"method": "fedavg-full", "classifier-init": "ridge"}, "ridge"),
        ({"method": "sfprompt"}, "zero"),
        ({"start-module": "m"}, "zero"),
        ({"start-module": "m", "classifier-init": "ridge"}, "ridge"),
        ({"robust-rule": "median"}, "zero"),
        ({"method": "closed-form", "start-module": "m"}, "ridge"),
    ],
)
def test_a_run_starts_from_ridge_unless_something_else_brings_a_classifier(
    flat: dict[str, Any], start: str
) -> None:
    config = RunConfig.from_flat(flat)
    assert config.module.classifier_init == start
    # Nobody named start or loss: then what ridge found is guarded while the classifier learns.
    guarded = start == "ridge" and "classifier-init" not in {
        *flat,
        *config.run.method_description.prefers,
    }
    assert config.train.loss == ("balanced-softmax" if guarded else "softmax")
    assert config.train.learning_rate == (0.003 if guarded else 0.01)
    assert RunConfig.from_flat(flat | {"learning-rate": 0.01}).train.learning_rate == 0.01
    assert RunConfig.from_flat(flat | {"loss": "softmax"}).train.loss == "softmax"
    assert (
        RunConfig.from_flat(
            flat | {"classifier-training": "fixed", "classifier-init": "ridge"}
        ).train.loss
        == "softmax"
    )
    assert RunConfig.resolved(config.flat()) == config
