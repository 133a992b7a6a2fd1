"""The run's settings: small, frozen, valid from birth. The one door for Flower's flat kebab-case keys.

`RunConfig.from_flat` is called by both apps and the CLI with `context.run_config` or `--set` pairs; it
reports every fault of a config at once. Defaults here equal `[tool.flwr.app.config]` in pyproject.toml
(a test holds them together).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedsplit.core.cut import Cut, parse_cuts
from fedsplit.core.errors import ConfigError

# What a resumed run takes from its new settings; all else is what the run was started with.
RESUME_KEYS = (
    "runs-dir", "deadline-s", "min-sites", "encoder-address", "encoder-bind",
    "encoder-secret-file", "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "encoder-insecure",
)  # fmt: skip
_SERVER_KEYS = (
    "runs-dir", "run-name", "resume", "encoder-bind", "encoder-secret-file", "encoder-tls-cert", "encoder-tls-key",
)  # fmt: skip
PARTITIONS = "iid, dirichlet:ALPHA, pathological:CLASSES or quantity:ALPHA"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class RunConfig(BaseModel):
    """Everything that decides what a run computes. Units stand in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab)

    backbone: str = "vit-glyphs"
    """A local model directory, a hub id, or the name of the bundled one."""
    task: str = Field("digits", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    """Name of the task: in tokens, summaries and the run's folder."""
    data: str = "digits"
    """digits | folder:PATH | csv:PATH | jsonl:PATH | npz:PATH | hf:NAME; a site's node config overrides."""
    classes: str = ""
    """The task's classes, comma-separated; empty: the union of the sites' class names."""
    text_column: str = Field("text", min_length=1)
    """Column of a csv, jsonl or hf source that holds the text."""
    label_column: str = Field("label", min_length=1)
    """Column that holds the label."""
    cut: str = "1,5"
    """"a,b", or several, "a,b;c,d", dealt to the sites in turn; a site's node config overrides."""
    method: Literal["fedv"] = "fedv"
    """How the module is trained: fedv is the U-shaped split with exact gradients, averaged each round."""
    module: Literal["lora", "classifier"] = "lora"
    """What is trained: LoRA and the classifier, or the classifier alone."""
    device_training: Literal["tail", "head+tail"] = "tail"
    """tail freezes a split's head, so that no gradient crosses the wire; a device without a split trains all."""
    encoder_training: Literal["frozen"] = "frozen"
    """What trains on the server."""
    lora_rank: int = Field(8, ge=1, le=1024)
    """Rank of LoRA's two matrices."""
    lora_alpha: int = Field(16, ge=1, le=2**20)
    """LoRA's output is scaled by lora-alpha / lora-rank."""
    lora_targets: str = ""
    """Comma-separated names of the linear layers that get LoRA; empty: query and value."""
    rounds: int = Field(5, ge=1, le=100_000)
    """Rounds of training; one more message tests the last module."""
    local_epochs: int = Field(1, ge=1, le=1000)
    """Times a site goes through its training samples in a round."""
    batch_size: int = Field(32, ge=1, le=4096)
    """Samples of a step; also the most that a site's token allows."""
    learning_rate: float = Field(0.01, gt=0, allow_inf_nan=False)
    """Learning rate of the classifier, and of LoRA where lora-learning-rate is 0."""
    lora_learning_rate: float = Field(0.0005, ge=0, allow_inf_nan=False)
    """Learning rate of LoRA; 0: the same as the classifier's."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rates go over the rounds: cosine falls from the full rate towards 0."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The site's optimiser; it starts anew in each round."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight decay of the optimiser."""
    codec: Literal["fp32", "fp16"] = "fp32"
    """How activations and gradients become bytes: fp32 (exact) or fp16 (half the bytes)."""
    in_flight: int = Field(2, ge=1, le=8)
    """Steps on the wire at once where the algorithm allows it: evaluation, frozen heads."""
    partition: str = "dirichlet:0.3"
    """How simulation deals one source to the sites; deployed sites have their own data."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of a site's samples that it keeps for testing."""
    max_samples: int = Field(0, ge=0)
    """Use at most this many samples of the source; 0: all."""
    image_size: int = Field(0, ge=0, le=2048)
    """Side of the images in pixels; 0: what the backbone was trained with."""
    max_length: int = Field(128, ge=4, le=8192)
    """Longest text in tokens; longer ones are cut."""
    sites: int = Field(0, ge=0)
    """Sites the run waits for; 0: all that are connected."""
    min_sites: int = Field(2, ge=1)
    """Fewer useful updates than this in a round end the run."""
    deadline_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """How long a round waits for its sites before it goes on without the missing ones."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides the module's start, the partition, the test split and the order of the batches."""
    encoder_address: str = ""
    """HOST:PORT that sites dial; empty: the app hosts the encoder on loopback."""
    encoder_bind: str = ""
    """HOST:PORT that the app's own encoder listens on; empty with an address: that encoder is elsewhere."""
    encoder_secret_file: str = ""
    """File with the key that signs the sites' tokens, shared with `fedsplit encoder serve`."""
    encoder_tls_cert: str = ""
    """PEM file: certificate of the app's own encoder port."""
    encoder_tls_key: str = ""
    """PEM file: its key; with an encoder elsewhere both are what the app shows to it."""
    encoder_tls_ca: str = ""
    """CA that sites check the encoder against: a PEM file, or "system"; a site's node config overrides."""
    encoder_insecure: bool = False
    """Allow the encoder port without TLS beyond loopback."""
    compare_local_only: bool = False
    """Also train every site alone, for as many epochs, and report how far that gets."""
    runs_dir: str = "runs"
    """Where runs are written, on the ServerApp's machine."""
    run_name: str = Field("", pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")
    """Folder of this run; empty: task and date."""
    resume: str = Field("", pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]{0,99})?$")
    """Name of a run in runs-dir to go on from, at its last checkpoint."""

    @field_validator("cut")
    @classmethod
    def _check_cut(cls, value: str) -> str:
        try:
            parse_cuts(value)
        except ConfigError as err:
            raise ValueError(str(err)) from err
        return value

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, value: str) -> str:
        name, _, arg = value.partition(":")
        good = value == "iid"
        if name in {"dirichlet", "quantity"}:
            good = _is_number(arg) and 0 < float(arg) < math.inf
        elif name == "pathological":
            good = arg.isascii() and arg.isdigit() and len(arg) < 10 and int(arg) > 0
        if not good:
            raise ValueError(f"partition {value[:100]!r} is not known; use {PARTITIONS}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        faults = []
        if self.sites and self.min_sites > self.sites:
            faults.append(
                f"min-sites={self.min_sites} is more than sites={self.sites}; lower min-sites"
            )
        if bool(self.encoder_tls_cert) != bool(self.encoder_tls_key):
            faults.append("encoder-tls-cert and encoder-tls-key go together; set both or neither")
        if faults:
            raise ValueError("\n  - ".join(faults))
        return self

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts that are dealt to the sites in turn."""
        return parse_cuts(self.cut)

    def learning_rate_factor(self, round_: int) -> float:
        """Factor on the learning rate in a round, 1 in the first: half a cosine over the rounds."""
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (round_ - 1) / self.rounds))

    def trains_head(self, cut: Cut) -> bool:
        """Does LoRA below the cut train? Always where nothing is split: then no gradient could cross."""
        return self.device_training == "head+tail" or cut.a == cut.b

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The declared classes, or None when the sites' union is to be used."""
        return tuple(c.strip() for c in self.classes.split(",") if c.strip()) or None

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Read Flower's flat kebab-case keys. Raises one ConfigError that lists every fault."""
        known = set(cls.keys())
        faults = [_unknown(key, known) for key in flat if key not in known]
        try:
            config = cls(**{k: v for k, v in flat.items() if k in known})
        except ValidationError as err:
            faults += [_fault(e) for e in err.errors()]
        if faults:
            raise ConfigError(
                "the run's settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return config

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """All config keys, as Flower and the CLI spell them."""
        return tuple(_kebab(name) for name in cls.model_fields)

    def flat(self) -> dict[str, str | int | float | bool]:
        """The settings as Flower's flat keys, defaults included."""
        return self.model_dump(by_alias=True)

    def flat_for_sites(self) -> dict[str, str | int | float | bool]:
        """The same without what is the server's own affair: its paths and where it listens."""
        return {k: v for k, v in self.flat().items() if k not in _SERVER_KEYS}


def parse_set(pairs: list[str]) -> dict[str, str | int | float | bool]:
    """Read `KEY=VALUE` pairs of the command line, typed by the key. Raises ConfigError for one without `=`."""
    flat: dict[str, str | int | float | bool] = {}
    faults: list[str] = []
    kinds = {_kebab(n): f.annotation for n, f in RunConfig.model_fields.items()}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq:
            faults.append(f"{pair!r} has no '='; use KEY=VALUE")
        else:
            # from_flat reports unknown keys together with all other faults.
            flat[key] = _typed(value, kinds.get(key))
    if faults:
        raise ConfigError("the settings have faults:\n" + "\n".join(f"  - {f}" for f in faults))
    return flat


def _typed(value: str, kind: Any) -> str | int | float | bool:
    """The value in its key's type where it reads as such; pydantic says the rest."""
    if kind is bool and value.lower() in {"true", "false"}:
        return value.lower() == "true"
    if kind is int and _is_integer(value):
        return int(value)
    if kind is float and _is_number(value):
        return float(value)
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    # Python refuses to read numbers of thousands of digits.
    return digits.isascii() and digits.isdigit() and len(digits) < 1000


def _unknown(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key {key[:100]!r}; {hint}"


def _fault(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    if where and not message.startswith(where):
        shown = repr(error["input"])
        return f"{where}={shown if len(shown) < 200 else shown[:200] + '...'}: {message}"
    return message
