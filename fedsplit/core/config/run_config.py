"""A run's settings: its sections, what needs several of them, and the one door for flat kebab-case keys.

`RunConfig.from_flat` reads `context.run_config` or `--set` pairs and reports every fault of a config
at once. Defaults here equal `[tool.flwr.app.config]` in pyproject.toml (a test holds them together).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
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
from fedsplit.core.methods import Value, apply


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

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        checks = [check for section in self._sections() for check in section.contradictions()]
        if faults := [text for wrong, text in (*checks, *across(self)) if wrong]:
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

    def fitted(self, blocks: int, *, sites: int = 0, samples: int = 0) -> RunConfig:
        """With what its recipe adapts to a backbone, to the number of sites and their samples in all; 0: not known yet.

        Raises ConfigError where the outcome contradicts itself.
        """
        if not self.run.recipe:
            return self
        found = recipes.fitted(self, blocks=blocks, sites=sites, samples=samples)
        return type(self).from_flat(self.flat() | recipes.changes(self, found))

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
        """Read Flower's flat kebab-case keys. Raises one ConfigError that lists every fault."""
        known = set(cls.keys())
        faults = [unknown(key, known) for key in flat if key not in known]
        defaults = cls.defaults()
        with_recipe = recipes.apply({k: v for k, v in flat.items() if k in known}, defaults)
        settled, more = apply(with_recipe, defaults)
        faults += more
        try:
            config = cls.model_validate(_nested(settled))
        except ValidationError as err:
            faults += [fault(e) for e in err.errors()]
        if faults:
            raise ConfigError(
                "the run's settings have faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return config

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
        return {key: field.default for key, (_, _, field) in FIELDS.items()}

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
    name: field.annotation  # type: ignore[misc]
    for name, field in RunConfig.model_fields.items()
}
FIELDS: dict[str, tuple[str, str, FieldInfo]] = {
    field.alias or kebab(name): (section, name, field)
    for section, kind in SECTIONS.items()
    for name, field in kind.model_fields.items()
}
"""Key -> its section, its name there, and its field."""


def marked(mark: Mark) -> tuple[str, ...]:
    """The keys whose field carries a mark."""
    return tuple(key for key, (_, _, field) in FIELDS.items() if mark in field.metadata)


RESUME_KEYS = marked(Mark.ANEW)
"""What a resumed run takes from its new settings; all else is what the run was started with."""


def parse_set(pairs: list[str]) -> Flat:
    """Read `KEY=VALUE` pairs of the command line, typed by the key. Raises ConfigError for one without `=`."""
    return read_pairs(pairs, {key: field.annotation for key, (_, _, field) in FIELDS.items()})


def _nested(flat: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """Section -> key -> value."""
    nested: dict[str, dict[str, Value]] = {}
    for key, value in flat.items():
        nested.setdefault(FIELDS[key][0], {})[key] = value
    return nested
