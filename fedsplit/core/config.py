"""The run's settings: small, frozen, valid from birth. The one door for Flower's flat kebab-case keys.

`RunConfig.from_flat` is called by both apps and the CLI with `context.run_config` or `--set` pairs; it
reports every fault of a config at once. Defaults here equal `[tool.flwr.app.config]` in pyproject.toml
(a test holds them together).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedsplit.core import recipes
from fedsplit.core.contradictions import contradictions
from fedsplit.core.cut import Cut, parse_cuts
from fedsplit.core.errors import ConfigError
from fedsplit.core.flat import Flat, fault, is_number, read_pairs, suggestion, unknown
from fedsplit.core.foreign import MAX_CLASS_CHARS, MAX_CLASSES, checked_name
from fedsplit.core.methods import METHODS, Method, apply
from fedsplit.core.misfits import misfits
from fedsplit.core.names import MAX_RUN_CHARS, MAX_TASK_CHARS, RULE, is_name, normalised
from fedsplit.core.tasks import parse_classes, parse_holders, parse_tasks

# What a resumed run takes from its new settings; all else is what the run was started with.
RESUME_KEYS = (
    "runs-dir", "deadline-s", "roster", "min-sites", "encoder-address", "encoder-bind",
    "encoder-secret-file", "encoder-tls-cert", "encoder-tls-key", "encoder-tls-ca", "encoder-insecure",
)  # fmt: skip
_SERVER_KEYS = (
    "runs-dir", "run-name", "resume", "start-module", "roster", "encoder-bind", "encoder-secret-file", "encoder-tls-cert", "encoder-tls-key",
)  # fmt: skip
PARTITIONS = "iid, dirichlet:ALPHA, pathological:CLASSES or quantity:ALPHA"


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class RunConfig(BaseModel):
    """Everything that decides what a run computes. Units stand in the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab)

    backbone: str = "vit-glyphs"
    """A local model directory, a hub id, or the name of the bundled one."""
    task: str = "digits"
    """Name of the task: in tokens, summaries and the run's folder."""
    data: str = "digits"
    """digits | folder:PATH | csv:PATH | jsonl:PATH | npz:PATH | hf:NAME. A site's node config overrides it."""
    tasks: str = ""
    """Several tasks "NAME=SOURCE;NAME=SOURCE" that take turns on one encoder; empty: one task, from task and data."""
    task_holders: str = ""
    """Simulation: which sites hold a task, by number, "NAME:0-3;NAME:2,5". All sites hold a task that is not named."""
    classes: str = ""
    """The task's classes, comma-separated; empty: the union of the sites' class names."""
    text_column: str = Field("text", min_length=1)
    """The column of a csv, jsonl or hf source that holds the text."""
    label_column: str = Field("label", min_length=1)
    """The column that holds the label."""
    pixel_max: float = Field(0.0, ge=0, le=2**32, allow_inf_nan=False)
    """The pixel value that is white in all images of a source; 0: found from the images and reported. A site's node config overrides it."""
    broken_files: Literal["refuse", "leave-out"] = "refuse"
    """What a site does if it cannot read some image files: refuse names them and takes no part; leave-out goes on without them."""
    cut: str = "1,5"
    """"a,b", or several, "a,b;c,d", dealt to the sites in turn. A site's node config overrides it."""
    recipe: Literal["", "closed-form", "shared", "shared-full", "tail", "personal"] = ""
    """Recommended settings, adapted to the backbone and the sites (docs/how-to/choose-a-method.md). Other settings that you give win."""
    recipe_keeps: str = ""
    """Comma-separated keys that were given at their default values; a recipe leaves them. `fedsplit run` writes this key."""
    method: str = "fedv"
    """A name for several of the keys below (docs/reference/methods.md)."""
    module: Literal["lora", "prompt", "adapter", "classifier", "full"] = "lora"
    """What trains besides the classifier: LoRA, prompt tokens, adapters, nothing, or all weights."""
    module_blocks: int = Field(0, ge=0)
    """How many of the last blocks get LoRA, adapters or trained weights; 0: all blocks, and with all weights the embeddings too."""
    device_training: Literal["tail", "head+tail"] = "tail"
    """tail freezes the head of a split: no gradient comes back to the device, and none leaves it unless the encoder trains. Without a split the device trains all blocks."""
    encoder_training: Literal["frozen", "hosted", "shared", "zeroth-order"] = "frozen"
    """What trains on the server: nothing, one copy for each site, one copy that the sites step in turn, or copies without gradients."""
    block_sampling: int = Field(0, ge=0)
    """FeSViBS: a training step leaves the encoder after a block that is drawn each round, this block or a later one; 0: after the last."""
    gradient: Literal["exact", "zeroth-order"] = "exact"
    """How the device finds its gradient: by backpropagation, or only from differences of losses."""
    zo_estimator: Literal["forward", "central", "one-point"] = "central"
    """Zeroth-order estimator. A step takes q+1, 2q or q forwards."""
    zo_queries: int = Field(1, ge=1, le=1024)
    """q, the number of directions in a zeroth-order step."""
    zo_epsilon: float = Field(0.01, gt=0, le=10)
    """Length of a zeroth-order perturbation."""
    zo_directions: Literal["gaussian", "sphere"] = "gaussian"
    """How zeroth-order directions are drawn."""
    lora_rank: int = Field(8, ge=1, le=1024)
    """Rank of LoRA's two matrices."""
    lora_alpha: int = Field(16, ge=1, le=2**20)
    """LoRA's output is scaled by lora-alpha / lora-rank."""
    lora_targets: str = ""
    """Comma-separated names of the linear layers that get LoRA, or all-linear; empty: query and value."""
    lora_ranks: str = ""
    """Ranks "4;8;16", dealt to the sites in turn, at most lora-rank; empty: lora-rank for all."""
    lora_aggregation: Literal[
        "plain", "ffa", "rolora", "flexlora", "flora", "lora-fair", "hetlora"
    ] = "plain"
    """How the sites' LoRA modules become one."""
    rank_pruning: float = Field(1.0, gt=0, le=1)
    """HetLoRA: the share of its rank that a site keeps after training has shrunk the other components; 1: always all."""
    rank_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    """HetLoRA: the weight in the loss of the components that rank-pruning may remove."""
    prompt_tokens: int = Field(8, ge=1, le=1024)
    """Number of tokens of module=prompt."""
    prompt_depth: Literal["first", "all"] = "first"
    """Where module=prompt puts tokens: before the first block only, or new tokens before every block (VPT-deep)."""
    adapter_width: int = Field(16, ge=1, le=4096)
    """Inner width of module=adapter."""
    classifier_init: Literal["auto", "zero", "class-means", "ridge"] = "auto"
    """The classifier's start: zero, or in closed form from summed statistics of frozen features. auto: the method's own start, else ridge, but zero with a start-module or a robust-rule."""
    ridge_lambda: float = Field(100.0, gt=0, allow_inf_nan=False)
    """Regularisation of classifier-init=ridge, in units of the features' mean variance."""
    calibrate: bool = True
    """Scale a closed-form classifier by a temperature, found on held-out samples of the sites."""
    classifier_training: Literal["trained", "fixed"] = "trained"
    """fixed keeps the classifier as it started."""
    rounds: int = Field(5, ge=0, le=100_000)
    """Rounds of training. One more message tests the last module."""
    participation: float = Field(1.0, gt=0, le=1)
    """Share of the sites that train in a round, drawn again each round. All sites are tested at the end."""
    local_epochs: int = Field(1, ge=1, le=1000)
    """How often a site goes through its training samples in a round."""
    local_loss_epochs: int = Field(0, ge=0, le=1000)
    """How often a site first goes through its training samples in a round with head joined to tail, without the encoder."""
    keep_hardest: float = Field(1.0, gt=0, le=1)
    """Share of its training samples that a site trains on in a round: those with the largest errors at its start; 1: all."""
    batch_size: int = Field(32, ge=1, le=4096)
    """Samples in a step. A site's token allows no more."""
    learning_rate: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Learning rate of the classifier, and of the rest if lora-learning-rate is 0. 0 means 0.01, or 0.003 if no setting of the classifier is given and it trains on from ridge."""
    lora_learning_rate: float = Field(0.0005, ge=0, allow_inf_nan=False)
    """Learning rate of everything that trains except the classifier; 0: the classifier's. With a shared encoder: of all sites' steps together."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rates change over the rounds: cosine falls from the full rate towards 0."""
    warmup_rounds: int = Field(0, ge=0, le=100_000)
    """Number of first rounds in which the learning rates rise to the full rate."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The site's optimiser. It starts again in each round."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight decay of the optimiser."""
    clip_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest gradient norm of a step on the device; 0: no limit."""
    accumulate: int = Field(1, ge=1, le=1024)
    """Number of batches whose gradients make one optimiser step."""
    loss: Literal["auto", "softmax", "one-vs-all", "balanced-softmax"] = "auto"
    """Cross-entropy, one yes-or-no question for each class, or cross-entropy balanced by the site's mix of classes. auto: softmax, but balanced-softmax if no setting of the classifier is given and it trains on from ridge."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the label that is spread over all classes."""
    augmentation: Literal["none", "flip", "crop+flip"] = "none"
    """Random changes of training images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the device's blocks in training. bf16 needs a CPU, or a GPU that supports it."""
    early_stop_rounds: int = Field(0, ge=0)
    """End after this many rounds without a better global accuracy, and keep the best module; 0: never."""
    proximal_mu: float = Field(0.0, ge=0, allow_inf_nan=False)
    """FedProx: weight of the squared distance to the received module."""
    personalisation: Literal["none", "ditto", "fed-rod"] = "none"
    """What a site keeps for itself besides the averaged module."""
    ditto_lambda: float = Field(0.1, ge=0, allow_inf_nan=False)
    """How strongly Ditto holds the personal module near the averaged one."""
    site_local: Literal["none", "classifier", "all"] = "none"
    """What the device trains and never sends: nothing, its classifier, or everything."""
    sync_every: int = Field(1, ge=1)
    """Rounds between two averages of what the devices train. In between it stays at the site."""
    server_optimizer: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    """What the server does with the mean update: apply it, or take a step of FedAvgM, FedAdam or FedYogi."""
    server_learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Learning rate of the server's optimiser. Good values: 1 with mean, about 0.1 with momentum, 0.01 with adam and yogi."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of server-optimizer=momentum, and the first beta of adam and yogi."""
    robust_rule: Literal["mean", "trimmed-mean", "median", "krum", "multi-krum", "bulyan"] = "mean"
    """How the sites' updates are combined. All rules except mean tolerate some hostile sites."""
    byzantine_sites: int = Field(0, ge=0)
    """Number of hostile sites that the robust rule must tolerate."""
    max_update_ratio: float = Field(20.0, ge=0, allow_inf_nan=False)
    """Refuse an update that moves this many times as far as the median of the sites'; 0: refuse none. With robust-rule=mean."""
    max_site_share: float = Field(0.5, ge=0.5, le=1)
    """Largest share of the average for one site's samples, or three times the median's share if that is more; 1: no limit."""
    step_back: bool = True
    """Undo a round in which most sites lost more than 10 points, or after which most cannot train."""
    codec: Literal["fp32", "fp16"] = "fp32"
    """How activations and gradients become bytes: fp32 (exact) or fp16 (half the bytes)."""
    in_flight: int = Field(2, ge=1, le=8)
    """Steps on the wire at the same time, where the algorithm allows it: evaluation, frozen heads."""
    cache_activations: bool = False
    """Keep the encoder's answer for each sample in memory while its module stays the same."""
    partition: str = "dirichlet:0.3"
    """How simulation deals one source to the sites. Deployed sites have their own data."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of a site's samples that it keeps for testing."""
    max_samples: int = Field(0, ge=0)
    """Use at most this many samples of the source; 0: all."""
    max_site_samples: int = Field(0, ge=0)
    """Simulation: a site keeps at most this many of the samples dealt to it; 0: all."""
    image_size: int = Field(0, ge=0, le=2048)
    """Side of the images in pixels; 0: the size that the backbone was trained with."""
    max_length: int = Field(128, ge=4, le=8192)
    """Longest text in tokens. Longer texts are cut."""
    sites: int = Field(0, ge=0)
    """Number of sites that the run waits for; 0: all that are connected."""
    roster: str = ""
    """Comma-separated names of the sites that take part, in place of `sites`; empty: all that are connected."""
    min_sites: int = Field(2, ge=1)
    """A round with fewer useful updates ends the run."""
    deadline_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """How long a round waits for its sites before it continues without the missing ones."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Sets the module's start, the order of the batches and, in simulation, partition and test split."""
    encoder_address: str = ""
    """HOST:PORT that sites connect to; empty: the app hosts the encoder on loopback."""
    encoder_bind: str = ""
    """HOST:PORT on which the app's own encoder listens. Empty with an address: the encoder runs elsewhere."""
    encoder_secret_file: str = ""
    """File with the key that signs the sites' tokens, shared with `fedsplit encoder serve`."""
    encoder_tls_cert: str = ""
    """PEM file: certificate of the app's own encoder port."""
    encoder_tls_key: str = ""
    """PEM file: its key. If the encoder runs elsewhere, the app shows both to it."""
    encoder_tls_ca: str = ""
    """CA with which sites check the encoder: a PEM file, or "system". A site's node config overrides it."""
    encoder_insecure: bool = False
    """Allow the encoder port without TLS beyond loopback."""
    start_module: str = ""
    """Folder of a trained module to start from, on the ServerApp's machine. Its classes stay, new ones are added. Empty: a new module."""
    compare_local_only: bool = False
    """Also train every site alone for as many epochs, and report its accuracy."""
    runs_dir: str = "runs"
    """Where runs are written, on the ServerApp's machine."""
    run_name: str = ""
    """Folder of this run; empty: task and date."""
    resume: str = ""
    """Name of a run in runs-dir to continue from its last checkpoint."""

    @field_validator("task", "run_name", "resume")
    @classmethod
    def _check_name(cls, value: str, info: ValidationInfo) -> str:
        name, most = (
            normalised(value),
            MAX_TASK_CHARS if info.field_name == "task" else MAX_RUN_CHARS,
        )
        if not is_name(name, most) and (name or info.field_name == "task"):
            raise ValueError(f"no name: 1 to {most} {RULE} are wanted")
        return name

    @field_validator("cut")
    @classmethod
    def _check_cut(cls, value: str) -> str:
        try:
            parse_cuts(value)
        except ConfigError as err:
            raise ValueError(str(err)) from err
        return value

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if len(names) > MAX_CLASSES:
            raise ValueError(f"classes has {len(names)} names, at most {MAX_CLASSES} are wanted")
        for name in names:
            if len(checked_name(name)) > MAX_CLASS_CHARS:
                raise ValueError(
                    f"classes: {name[:50]!r}... has {len(name)} characters, at most {MAX_CLASS_CHARS} are wanted"
                )
        return value

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, value: str) -> str:
        try:
            parse_tasks(value)
        except ConfigError as err:
            raise ValueError(str(err)) from err
        return value

    @field_validator("task_holders")
    @classmethod
    def _check_holders(cls, value: str) -> str:
        try:
            parse_holders(value)
        except ConfigError as err:
            raise ValueError(str(err)) from err
        return value

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, value: str) -> str:
        name, _, arg = value.partition(":")
        good = value == "iid"
        if name in {"dirichlet", "quantity"}:
            good = is_number(arg) and 0 < float(arg) < math.inf
        elif name == "pathological":
            good = arg.isascii() and arg.isdigit() and len(arg) < 10 and int(arg) > 0
        if not good:
            raise ValueError(f"partition {value[:100]!r} is not known; use {PARTITIONS}")
        return value

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(unknown_method(value))
        return value

    @field_validator("roster")
    @classmethod
    def _check_roster(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")] if value else []
        if not all(names) or len(set(names)) != len(names):
            raise ValueError(
                f"roster {value[:100]!r} is no list of names; give each site's name once, e.g. line-a,line-b"
            )
        return value

    @field_validator("lora_ranks")
    @classmethod
    def _check_ranks(cls, value: str) -> str:
        parts = [part.strip() for part in value.split(";")] if value else []
        if any(not (p.isascii() and p.isdigit() and 0 < len(p) < 5 and int(p)) for p in parts):
            raise ValueError(f"lora-ranks {value[:100]!r} are not ranks; use e.g. 4;8;16")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        if faults := contradictions(self):
            raise ValueError("\n  - ".join(faults))
        return self

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts that are dealt to the sites in turn."""
        return parse_cuts(self.cut)

    @property
    def sources(self) -> dict[str, str]:
        """Task -> source: those of `tasks`, else the one of `task` and `data`."""
        return parse_tasks(self.tasks) or {self.task: self.data}

    @property
    def holders(self) -> dict[str, frozenset[int]]:
        """Task -> numbers of the simulated sites that hold it, for the tasks that not all sites hold."""
        return parse_holders(self.task_holders)

    def of_task(self, name: str) -> RunConfig:
        """The settings by which one of the run's tasks runs."""
        return self.model_copy(update={"task": name, "data": self.sources[name]})

    @property
    def method_description(self) -> Method:
        """What the method's name stands for."""
        return METHODS[self.method]

    def cuts_on(self, blocks: int) -> tuple[Cut, ...]:
        """The cuts that are dealt on a backbone of `blocks` blocks; a method may want whole devices."""
        if self.method_description.placement == "device":
            return (Cut(blocks, blocks),)
        return self.cuts

    def fitted(self, blocks: int, *, sites: int = 0, samples: int = 0) -> RunConfig:
        """With what its recipe adapts to a backbone, to the number of sites and their samples in all; 0: not known yet.

        Raises ConfigError where the outcome contradicts itself.
        """
        if not self.recipe:
            return self
        found = recipes.fitted(self, blocks=blocks, sites=sites, samples=samples)
        return type(self).from_flat(self.flat() | recipes.changes(self, found))

    def recipe_told(self, blocks: int, *, sites: int = 0, samples: int = 0) -> list[str]:
        """What the recipe chose and what it left as given, a line each; empty without one. For a fitted config."""
        if not self.recipe:
            return []
        found = recipes.fitted(self, blocks=blocks, sites=sites, samples=samples)
        return recipes.told(self, found)

    def check_blocks(self, blocks: int) -> None:
        """Raise one ConfigError with every setting that does not fit a backbone of `blocks` blocks."""
        if faults := misfits(self, blocks):
            raise ConfigError("\n  - ".join(faults))

    @property
    def classifier_start(self) -> Literal["zero", "class-means", "ridge"]:
        """How the classifier starts; `from_flat` has settled an auto already."""
        return "ridge" if self.classifier_init == "auto" else self.classifier_init

    @property
    def untrained(self) -> bool:
        """Is the classifier all zeros before the first round? Then it names one class always."""
        return self.classifier_start == "zero" and not self.start_module

    @property
    def loss_kind(self) -> Literal["softmax", "one-vs-all", "balanced-softmax"]:
        """The loss; `from_flat` has settled an auto already."""
        return "softmax" if self.loss == "auto" else self.loss

    @property
    def ranks(self) -> tuple[int, ...]:
        """The LoRA ranks that are dealt to the sites in turn."""
        return tuple(int(r) for r in self.lora_ranks.split(";") if r) or (self.lora_rank,)

    def learning_rate_factor(self, round_: int) -> float:
        """Factor on the learning rate in a round: a straight rise, then half a cosine over the rest."""
        if round_ <= self.warmup_rounds:
            return round_ / (self.warmup_rounds + 1)
        if self.lr_schedule == "constant":
            return 1.0
        done, all_ = round_ - self.warmup_rounds - 1, self.rounds - self.warmup_rounds
        return 0.5 * (1 + math.cos(math.pi * done / all_))

    @property
    def roster_names(self) -> tuple[str, ...]:
        """The names of the sites that take part; empty: whoever is connected."""
        return tuple(name.strip() for name in self.roster.split(",") if name.strip())

    @property
    def expected_sites(self) -> int:
        """How many sites take part; 0: as many as are connected."""
        return len(self.roster_names) or self.sites

    @property
    def wanted_sites(self) -> int:
        """How many sites the run waits for."""
        return self.expected_sites or self.min_sites

    def selected(self, sites: int) -> int:
        """How many of `sites` sites train in a round."""
        return round(self.participation * sites)

    def syncs(self, round_: int) -> bool:
        """Is what the devices trained sent and averaged in this round? The last round always is."""
        return round_ % self.sync_every == 0 or round_ == self.rounds

    def trains_head(self, cut: Cut) -> bool:
        """Does LoRA below the cut train? Always where nothing is split: then no gradient could cross."""
        return self.device_training == "head+tail" or cut.a == cut.b

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The declared classes, or None when the sites' union is to be used."""
        return parse_classes(self.classes) or None

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Read Flower's flat kebab-case keys. Raises one ConfigError that lists every fault."""
        known = set(cls.keys())
        faults = [unknown(key, known) for key in flat if key not in known]
        defaults = cls.defaults()
        with_recipe = recipes.apply({k: v for k, v in flat.items() if k in known}, defaults)
        settled, more = apply(with_recipe, defaults)
        faults += more
        try:
            config = cls(**settled)  # type: ignore[arg-type]
        except ValidationError as err:
            faults += [fault(e) for e in err.errors()]
        if faults:
            raise ConfigError(
                "the run's settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return config

    @classmethod
    def defaults(cls) -> Flat:
        """Every key with its default."""
        return {_kebab(name): field.default for name, field in cls.model_fields.items()}

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


def parse_set(pairs: list[str]) -> Flat:
    """Read `KEY=VALUE` pairs of the command line, typed by the key. Raises ConfigError for one without `=`."""
    return read_pairs(pairs, {_kebab(n): f.annotation for n, f in RunConfig.model_fields.items()})


def unknown_method(value: str) -> str:
    """That a method is not known, with the nearest ones that are."""
    return f"method {value[:100]!r} is not known; {suggestion(value, METHODS, 'there are')}"
