"""A run's settings: its sections, what needs several of them, and the one door for flat kebab-case keys.

`RunConfig.from_flat` reads `context.run_config` or `--set` pairs, reports every fault of a config at once, and keeps what
was given. `[tool.flwr.app.config]` in pyproject.toml has the same keys (a test holds them together), each at the word
"default".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

from fedsplit.core import recipes
from fedsplit.core.config.across import across
from fedsplit.core.config.flat import Flat, fault, read_pairs, unknown
from fedsplit.core.config.link import LinkSection
from fedsplit.core.config.misfits import misfits
from fedsplit.core.config.module import ModuleSection
from fedsplit.core.config.placement import PlacementSection
from fedsplit.core.config.run import RunSection
from fedsplit.core.config.section import Mark, Section, kebab
from fedsplit.core.config.server import ServerSection
from fedsplit.core.config.task import TaskSection
from fedsplit.core.config.train import TrainSection
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.core.methods import DEFAULT, METHODS, Value, apply

NOT_GIVEN = "default"
"""The value of a key that was not given. All keys of `[tool.flwr.app.config]` have it: Flower hands over every key."""


class Origin(Enum):
    """Where a key's value comes from."""

    DEFAULT = "default"
    GIVEN = "given"
    RECIPE = "recipe"
    METHOD = "method"
    AUTOMATIC = "automatic"


class Key(NamedTuple):
    """Where a key of the outside is kept."""

    section: str
    name: str
    """Of the field in its section."""
    field: FieldInfo


_ORDER: dict[str, str] = {}
"""The context of validation for the settings of an order."""


class RunConfig(BaseModel):
    """Everything that decides what a run computes; frozen and valid from birth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSection = RunSection()
    task: TaskSection = TaskSection()
    placement: PlacementSection = PlacementSection()
    module: ModuleSection = ModuleSection()
    train: TrainSection = TrainSection()
    server: ServerSection = ServerSection()
    link: LinkSection = LinkSection()
    origins: Mapping[str, Origin] = {}
    """Key -> where its value comes from; a key that is not here is at its default."""

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> RunConfig:
        checks = [check for section in self._sections() for check in section.contradictions()]
        both = across(self, start_known=info.context is not _ORDER)
        if faults := [text for wrong, text in (*checks, *both) if wrong]:
            raise ValueError("\n  - ".join(faults))
        return self

    def _sections(self) -> list[Section]:
        return [getattr(self, name) for name in SECTIONS]

    def of_task(self, name: str) -> RunConfig:
        """The settings by which one of the run's tasks runs."""
        return self.changed(task=name, data=self.task.sources[name])

    def cuts_on(self, blocks: int) -> tuple[Cut, ...]:
        """The cuts that are dealt on a backbone of `blocks` blocks; a method may want whole devices."""
        if self.run.method_description.placement == "device":
            return (Cut(blocks, blocks),)
        return self.placement.cuts

    def on_device(self, blocks: int) -> RunConfig:
        """With the cut that a method of whole devices means on a backbone of `blocks` blocks."""
        cut = ";".join(str(cut) for cut in self.cuts_on(blocks))
        origins = {**self.origins, "cut": Origin.METHOD}
        return self.changed(cut=cut).model_copy(update={"origins": origins})

    def fitted(self, blocks: int, *, sites: int = 0, samples: int = 0) -> RunConfig:
        """With what its recipe adapts to a backbone, to the number of sites and their samples in all; 0: not known yet.

        Raises ConfigError where the outcome contradicts itself.
        """
        if not self.run.recipe:
            return self
        found = recipes.fitted(self, blocks=blocks, sites=sites, samples=samples)
        changes = recipes.changes(self, found)
        origins = {**self.origins, **dict.fromkeys(changes, Origin.RECIPE)}
        return self.resolved(self.flat() | changes).model_copy(update={"origins": origins})

    def recipe_told(self, blocks: int, *, sites: int = 0, samples: int = 0) -> list[str]:
        """What the recipe chose and what it left as given, a line each; empty without one. For a fitted config."""
        if not self.run.recipe:
            return []
        found = recipes.fitted(self, blocks=blocks, sites=sites, samples=samples)
        return recipes.told(self, found)

    def check_blocks(self, blocks: int) -> None:
        """Raise one ConfigError with every setting that does not fit a backbone of `blocks` blocks."""
        if faults := misfits(self, blocks):
            raise ConfigError("\n  - ".join(faults))

    @property
    def untrained(self) -> bool:
        """Is the classifier all zeros before the first round? Then it names one class always, and of numbers the mean."""
        zero = self.module.classifier_start == "zero" and not self.run.start_module
        return zero and self.task.target == "class"

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> RunConfig:
        """Read the keys that somebody gave, and settle the others by recipe, method and defaults.

        A key at the word "default" was not given: Flower hands over all keys. Raises one ConfigError that lists
        every fault, and among them what was given and the method would overrule.
        """
        given = {k: v for k, v in flat.items() if v != NOT_GIVEN}
        faults = [unknown(key, set(FIELDS)) for key in given if key not in FIELDS]
        given = {k: v for k, v in given.items() if k in FIELDS}
        chosen = recipes.apply(given)
        settled, more = apply(chosen)
        config = cls._read(settled, [*faults, *more])
        origins = {key: _origin(key, value, given, chosen) for key, value in settled.items()}
        return config.model_copy(update={"origins": origins})

    @classmethod
    def resolved(cls, flat: Mapping[str, Any], *, of_order: bool = False) -> RunConfig:
        """Read back what `flat` gave: settled already, so that nothing is open and nothing is overruled.

        For the settings of a run that is resumed, and `of_order`, which do not say what the run starts from. Raises
        ConfigError as `from_flat` does.
        """
        faults = [unknown(key, set(FIELDS)) for key in flat if key not in FIELDS]
        known = {k: v for k, v in flat.items() if k in FIELDS}
        config = cls._read(known, faults, context=_ORDER if of_order else None)
        return config.model_copy(update={"origins": dict.fromkeys(FIELDS, Origin.GIVEN)})

    @classmethod
    def _read(
        cls, flat: Mapping[str, Value], faults: list[str], context: object = None
    ) -> RunConfig:
        """The settings at these keys; `faults` are those that are known already."""
        try:
            config = cls.model_validate(_nested(flat), context=context)
        except ValidationError as err:
            faults = [*faults, *(fault(e) for e in err.errors())]
        if faults:
            raise ConfigError(
                "the run's settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return config

    @property
    def given(self) -> frozenset[str]:
        """The keys that somebody gave, also those at their default."""
        return frozenset(k for k, origin in self.origins.items() if origin is Origin.GIVEN)

    def __eq__(self, other: object) -> bool:
        """Equal settings; where they come from decides how they are adapted and told, not what they are."""
        return isinstance(other, RunConfig) and self._sections() == other._sections()

    def __hash__(self) -> int:
        return hash(tuple(self._sections()))

    @classmethod
    def of(cls, **fields: Value) -> RunConfig:
        """`from_flat` for keys that are written as names: `RunConfig.of(lora_rank=4)`."""
        return cls.from_flat({kebab(name): value for name, value in fields.items()})

    def changed(self, **fields: Value) -> RunConfig:
        """A copy with these keys, written as names, at other values. They are taken as they are."""
        new: dict[str, dict[str, Value]] = {}
        for name, value in fields.items():
            section, field, _ = FIELDS[kebab(name)]
            new.setdefault(section, {})[field] = value
        copies = {s: getattr(self, s).model_copy(update=update) for s, update in new.items()}
        return self.model_copy(update=copies)

    @classmethod
    def defaults(cls) -> Flat:
        """Every key with its default."""
        return {name: key.field.default for name, key in FIELDS.items()}

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """All config keys, as Flower and the CLI spell them."""
        return tuple(FIELDS)

    def flat(self) -> Flat:
        """The settings as Flower's flat keys, defaults included."""
        return {key: getattr(getattr(self, s), field) for key, (s, field, _) in FIELDS.items()}

    def flat_for_sites(self) -> Flat:
        """The same without what is the server's own affair: its paths and where it listens."""
        own = marked(Mark.SERVERS_OWN)
        return {key: value for key, value in self.flat().items() if key not in own}


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
FIELDS: dict[str, Key] = {
    field.alias or kebab(name): Key(section, name, field)
    for section, kind in SECTIONS.items()
    for name, field in kind.model_fields.items()
}
"""Every key, in the order of the sections."""


def marked(mark: Mark) -> tuple[str, ...]:
    """The keys whose field carries a mark."""
    return tuple(name for name, key in FIELDS.items() if mark in key.field.metadata)


RESUME_KEYS = marked(Mark.ANEW)
"""What a resumed run takes from its new settings; all else is what the run was started with."""


def parse_set(pairs: list[str]) -> Flat:
    """Read `KEY=VALUE` pairs of the command line, typed by the key. Raises ConfigError for one without `=`."""
    flat = read_pairs(pairs, {name: key.field.annotation for name, key in FIELDS.items()})
    if unsaid := [key for key, value in flat.items() if value == NOT_GIVEN]:
        raise ConfigError(
            f"{unsaid[0]}={NOT_GIVEN}: the word stands for a key that is not given; leave {unsaid[0]} out, or choose "
            f"another value"
        )
    return flat


def _origin(
    key: str, value: Value, given: Mapping[str, Value], chosen: Mapping[str, Value]
) -> Origin:
    """Where a settled value comes from; `chosen`: what was given with what the recipe set."""
    if key in given and given[key] == value:
        return Origin.GIVEN
    if key in chosen and chosen[key] == value:
        return Origin.RECIPE
    method = METHODS.get(str(chosen.get("method", DEFAULT)))
    if method is not None and value == {**method.prefers, **method.fixes}.get(key):
        return Origin.METHOD
    return Origin.AUTOMATIC


def _nested(flat: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Section -> key -> value."""
    nested: dict[str, dict[str, Value]] = {}
    for key, value in flat.items():
        nested.setdefault(FIELDS[key].section, {})[key] = value
    return nested
