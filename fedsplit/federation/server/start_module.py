"""A run's start from an earlier run's trained module.

A classifier's rows go by the names of their classes: known ones are kept, also where no site has the class any more,
and new ones start as the run's classifier does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.core.scores import Target
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec, ModuleTensors
from fedsplit.predict.found import find_module
from fedsplit.registry.places import is_registry

_NAMES_SHOWN = 400


@dataclass(frozen=True)
class StartModule:
    """An earlier module and what it is made of."""

    folder: Path
    digest: str
    backbone: Backbone
    spec: ModuleSpec
    tensors: ModuleTensors

    @classmethod
    def read(cls, config: RunConfig, backbone: Backbone) -> StartModule | None:
        """The module of `start-module`, or None. Raises BackboneError and ConfigError where it does not fit the run."""
        if not config.run.start_module:
            return None
        place = config.run.registry_folder
        try:
            found = find_module(
                config.run.start_module, registry=place if place and is_registry(place) else None
            )
        except ConfigError as err:
            raise ConfigError(f"start-module: {err}") from err
        folder = found.folder
        spec, tensors = module.load_exported(folder, backbone)
        if spec.kind != config.module.kind:
            raise ConfigError(
                f"start-module={folder} holds module={spec.kind}, the run trains module={config.module.kind}; use the "
                f"same kind"
            )
        target: Target = "class" if spec.numbers is None else "number"
        if target != config.task.target:
            raise ConfigError(
                f"start-module={folder} was trained on target={target}, the run trains on target={config.task.target}; use a "
                f"module of the same kind"
            )
        return cls(folder, found.digest, backbone, spec, tensors)

    def classes(self, sites: Iterable[str]) -> tuple[str, ...]:
        """The run's classes: the earlier module's and those of the sites, sorted."""
        return tuple(sorted({*self.spec.classes, *sites}))

    def added(self, classes: Iterable[str]) -> list[str]:
        """Those of `classes` that the module does not know."""
        return [name for name in classes if name not in self.spec.classes]

    def notes(self, classes: Iterable[str], held: Mapping[str, Iterable[str]]) -> list[str]:
        """What became of the classes in the run's `classes`; `held`: site -> its classes."""
        of = set(classes)
        at = {name for names in held.values() for name in names}
        notes = []
        for name in self.added(sorted(of)):
            who = sorted(site for site, names in held.items() if name in names)
            notes.append(
                f"class {name!r} is new to the start-module (at {', '.join(who) or 'no site'}): its row of the "
                "classifier starts anew"
            )
        if away := sorted(set(self.spec.classes) & of - at):
            notes.append(
                f"no site has a sample of {_shown(away)}: known from the start-module and kept in the classifier"
            )
        if dropped := sorted(set(self.spec.classes) - of):
            notes.append(f"{_shown(dropped)} of the start-module: not in classes and left out")
        return notes

    def onto(self, base: ModuleTensors, spec: ModuleSpec) -> ModuleTensors:
        """`base` with every tensor of the earlier module, and with the rows of the classes that it knows.

        Raises ConfigError where a tensor has another shape.
        """
        rows = {name: i for i, name in enumerate(self.spec.classes)}
        pairs = [(i, rows[name]) for i, name in enumerate(spec.classes) if name in rows]
        last = module.final_linear(self.backbone, spec)
        odd = []
        started = {}
        for name, value in base.items():
            old = self.tensors.get(name)
            if name in last and old is not None and old.shape[1:] == value.shape[1:]:
                started[name] = value.copy()
                for at, row in pairs:
                    started[name][at] = old[row]
            elif old is not None and old.shape == value.shape:
                started[name] = old
            else:
                odd.append(name)
        if odd:
            raise ConfigError(
                f"start-module={self.folder} lacks {odd[0]} at shape {base[odd[0]].shape} ({len(odd)} "
                f"tensors in all); use the rank, targets and sizes that it was trained with"
            )
        return started


def _shown(names: list[str]) -> str:
    of = "class" if len(names) == 1 else f"{len(names)} classes"
    return f"{of} {printable(', '.join(names), limit=_NAMES_SHOWN)}"
