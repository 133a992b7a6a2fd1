"""Methods as descriptions: which settings a name stands for, where it runs, and whose idea it is. No code paths.

A method says what is trained where, by which gradient, and what is aggregated how, in the keys of RunConfig.
`core/config` applies the description when settings are read; every floor above reads the resolved keys alone.
Sources are the papers; where a description leaves something of a paper out, its summary says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedsplit.core.cut import parse_cuts
from fedsplit.core.errors import ConfigError

Value = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class Method:
    """One named method."""

    summary: str
    """What it does, in a sentence or two."""
    source: str
    """The paper, or what it is without one."""
    placement: Literal["any", "split", "device"] = "any"
    """device: every site runs the whole model; split: some block must run on the server."""
    gathers: bool = False
    """Does one site have the samples of all?"""
    alone: bool = False
    """Does every site train alone, with no round of all?"""
    fixes: Mapping[str, Value] = field(default_factory=dict)
    """Key -> value that makes the method what it is; another value given is a fault."""
    prefers: Mapping[str, Value] = field(default_factory=dict)
    """Key -> value in place of the default; another value given is taken."""
    one_of: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Key -> the values that fit the method."""


# A rival's and a bound's classifier starts as published; ours start in closed form.
_ZERO: Mapping[str, Value] = {"classifier-init": "zero"}
_WHOLE: Mapping[str, Value] = {"encoder-training": "frozen"}
_FESTA: Mapping[str, Value] = {
    "module": "full",
    "encoder-training": "shared",
    "device-training": "head+tail",
}
_OF_NUMBERS: Mapping[str, Value] = {"partition": "iid", "calibrate": False}
_MODULES: tuple[Value, ...] = ("lora", "prompt", "adapter")

DEFAULT = "fedv"
"""The method of a run that names none."""

METHODS: dict[str, Method] = {
    "fedv": Method(
        summary="U-shaped split with exact gradients. Each round averages what the devices train.",
        source="FedV, arXiv 2403.16050",
        one_of={"encoder-training": ("frozen", "hosted", "shared"), "gradient": ("exact",)},
    ),
    "fedvz": Method(
        summary=(
            "The same split without a gradient on the wire. The server's module trains from differences of the "
            "losses that sites report. Heads are frozen; classifiers train at the site with exact gradients."
        ),
        source="FedVZ, arXiv 2403.16050; estimators after MeZO, arXiv 2305.17333",
        placement="split",
        fixes={"encoder-training": "zeroth-order", "gradient": "exact", "device-training": "tail"},
        one_of={"module": ("lora", "adapter", "full")},
    ),
    "fedvz-device": Method(
        summary=(
            "Zeroth order at the device: it only runs forward. Updates travel as scalars. The module does too, if a "
            "site can replay what it missed."
        ),
        source="MeZO, arXiv 2305.17333; seeds and scalars as in FedKSeed, arXiv 2312.06353",
        fixes={"gradient": "zeroth-order", **_WHOLE},
        prefers={"optimizer": "sgd"},
    ),
    "fedyolo": Method(
        summary="The device loads the backbone once. Only one module for each task travels.",
        source="FedYolo, arXiv 2307.04905",
        placement="device",
        fixes=_WHOLE,
        one_of={"module": _MODULES},
    ),
    "closed-form": Method(
        summary="Ridge regression (or class means) from summed statistics of frozen features, in one round.",
        source="Fed3R, arXiv 2406.01116; class means: FedNCM",
        fixes={"module": "classifier", "rounds": 0, **_WHOLE},
        prefers={"classifier-init": "ridge"},
        one_of={"classifier-init": ("ridge", "class-means")},
    ),
    "centralised": Method(
        summary="One site has the data of all: the bound that a federation is compared with.",
        source="upper bound",
        placement="device",
        gathers=True,
        fixes={"min-sites": 1, **_WHOLE},
        prefers=_ZERO,
    ),
    "local-only": Method(
        summary="Every site trains alone, for as many epochs as the rounds have. Nothing is averaged.",
        source="lower bound",
        alone=True,
        fixes={"compare-local-only": True},
        prefers=_ZERO,
    ),
    "linear-probe": Method(
        summary="Only the classifier trains, on frozen features, with FedAvg.",
        source="baseline",
        fixes={"module": "classifier", "loss": "softmax", **_WHOLE},
        prefers=_ZERO,
    ),
    "one-vs-all-probe": Method(
        summary="Only the classifier trains, on frozen features, with one yes-or-no question for each class and FedAvg.",
        source="OvA-LP",
        fixes={"module": "classifier", "loss": "one-vs-all", **_WHOLE},
        prefers=_ZERO,
    ),
    "head-tail": Method(
        summary="All weights of head and tail train. The encoder is frozen.",
        source="baseline",
        placement="split",
        fixes={"module": "full", "device-training": "head+tail", **_WHOLE},
        prefers=_ZERO,
    ),
    "fedavg-full": Method(
        summary="Every site trains all weights of the whole model. Each round averages them.",
        source="FedAvg, arXiv 1602.05629",
        placement="device",
        fixes={"module": "full", **_WHOLE},
        prefers=_ZERO,
    ),
    "fedavg-lora": Method(
        summary="Every site runs the whole model and trains LoRA and the classifier. There is no split.",
        source="FedIT, arXiv 2305.05644",
        placement="device",
        fixes={"module": "lora", **_WHOLE},
        prefers=_ZERO,
    ),
    "fedprox": Method(
        summary="The loss of local training adds proximal-mu / 2 times the squared distance to the received module.",
        source="FedProx, arXiv 1812.06127",
        prefers={**_ZERO, "proximal-mu": 0.01},
    ),
    "ditto": Method(
        summary="Each site also keeps a personal module. ditto-lambda holds it near the averaged one.",
        source="Ditto, arXiv 2012.04221",
        fixes={"personalisation": "ditto", "gradient": "exact"},
        prefers=_ZERO,
    ),
    "fed-rod": Method(
        summary=(
            "A generic classifier with balanced softmax (plain softmax if it is fixed), and a personal classifier "
            "that stays at the site."
        ),
        source="Fed-RoD, arXiv 2107.00778",
        fixes={"personalisation": "fed-rod", "gradient": "exact"},
        prefers=_ZERO,
    ),
    "festa": Method(
        summary=(
            "All weights train; every site's steps train the blocks between the cuts at the server. The paper's cut "
            "is 0,L. Unlike the released code it averages by samples and steps every site's gradient."
        ),
        source="FESTA, arXiv 2111.01338, as FeSViBS (arXiv 2306.14638) runs it, without its sampling of blocks",
        placement="split",
        fixes=_FESTA,
        prefers=_ZERO,
    ),
    "fesvibs": Method(
        summary=(
            "FESTA, but a training step leaves the blocks early, after a block that is drawn for each site and round, "
            "and goes to norm and pooling. Tests use all blocks. The cut ends at the last block: 0,L."
        ),
        source="FeSViBS, arXiv 2306.14638, with the backbone's norm and pooling in place of its projection network",
        placement="split",
        fixes=_FESTA,
        prefers={**_ZERO, "block-sampling": 1},
    ),
    "sfprompt": Method(
        summary=(
            "Prompt tokens and the classifier train; all blocks are frozen. Each round first trains head and tail "
            "joined, without traffic, then through the encoder on the samples with the largest errors."
        ),
        source="SFPrompt, arXiv 2407.17533; scores: EL2N, arXiv 2107.07075",
        placement="split",
        fixes={"module": "prompt", "device-training": "head+tail", **_WHOLE},
        prefers={**_ZERO, "local-loss-epochs": 1, "keep-hardest": 0.8},
    ),
    "splitfrozen": Method(
        summary=(
            "The head is frozen and gets no gradient. LoRA trains at the server, and in the tail if there is one. "
            "The paper's cut is a,L. Labels stay at the site."
        ),
        source="SplitFrozen, arXiv 2503.18986, in U-shape",
        placement="split",
        fixes={"module": "lora", "device-training": "tail"},
        prefers={**_ZERO, "encoder-training": "shared"},
        one_of={"encoder-training": ("shared", "hosted")},
    ),
}


def apply(given: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """What was given, with what the method wants beside it; and what in it the method would overrule, in words."""
    name = given.get("method", DEFAULT)
    method = METHODS.get(str(name))
    if method is None:
        return dict(given), []
    given = {key: value for key, value in given.items() if _AUTOMATIC.get(key) != value}
    # What speaks of classes by default is left out where it is not given.
    kind = _OF_NUMBERS if given.get("target") == "number" else {}
    settled, faults = {**kind, **method.prefers, **given, **method.fixes}, list[str]()
    for key, value in method.fixes.items():
        if given.get(key, value) != value:
            faults.append(
                f"{key}={_text(given[key])}: method={name} means {key}={_text(value)}; leave {key} out, or choose "
                f"another method"
            )
    settled |= _settled(settled)
    for key, values in method.one_of.items():
        if key in settled and settled[key] not in values:
            options = ", ".join(map(_text, values))
            faults.append(f"{key}={settled[key]} does not fit method={name}; use one of {options}")
    if method.placement == "device" and _splits(str(given.get("cut", ""))):
        faults.append(
            f"cut={given['cut']}: method={name} runs the whole model on the device; leave cut out"
        )
    return settled, faults


def _splits(cut: str) -> bool:
    """Does some cut leave blocks to the server? What is no cut is told elsewhere."""
    try:
        return any(c.a < c.b for c in parse_cuts(cut))
    except ConfigError:
        return False


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# What leaves the choice to the method, and without one to `_settled`.
_AUTOMATIC: Mapping[str, Value] = {"classifier-init": "auto", "loss": "auto", "learning-rate": 0}


def _settled(flat: Mapping[str, Value]) -> dict[str, Value]:
    """What is automatic where nobody names it: the classifier's start, the loss and the classifier's learning rate.

    An earlier module brings its classifier; and sums have no robust rule: one hostile site would decide a ridge.
    Where labels are skewed, averages of classifiers that learn by plain softmax, or fast, lose what ridge found.
    """
    found: dict[str, Value] = {}
    keeps = False
    numbers = flat.get("target") == "number"
    if "classifier-init" not in flat:
        others = flat.get("start-module") or flat.get("robust-rule", "mean") != "mean"
        found["classifier-init"] = "zero" if others else "ridge"
        keeps = not others and flat.get("classifier-training", "trained") == "trained"
    if "loss" not in flat:
        found["loss"] = "squared" if numbers else "balanced-softmax" if keeps else "softmax"
    if "learning-rate" not in flat:
        found["learning-rate"] = 0.003 if keeps else 0.01
    return found
