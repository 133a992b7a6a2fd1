"""The run itself: the method or recipe that it follows, its seed, its names and folders, and what it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedsplit.core.config.flat import suggestion
from fedsplit.core.config.section import ANEW, SERVERS_OWN, Check, Section, a_name
from fedsplit.core.methods import DEFAULT, METHODS, Method
from fedsplit.core.names import MAX_RUN_CHARS

MODULES = "modules"
"""The folder of a registry of modules beside the runs."""


class RunSection(Section):
    """The run itself."""

    recipe: Literal["", "closed-form", "shared", "shared-full", "tail", "personal"] = ""
    """Recommended settings, adapted to the backbone and the sites (docs/how-to/choose-a-method.md). Other settings that you give win."""
    method: str = DEFAULT
    """A name for several of the keys below (docs/reference/methods.md)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Sets the module's start, the order of the batches and, in simulation, partition and test split."""
    start_module: Annotated[str, SERVERS_OWN] = ""
    """A trained module to start from: its folder on the ServerApp's machine, or one of its registry (TASK@ALIAS, TASK#NUMBER). Its classes stay, new ones are added. Empty: a new module."""
    runs_dir: Annotated[str, ANEW, SERVERS_OWN] = "runs"
    """Where runs are written, on the ServerApp's machine."""
    registry: Annotated[str, ANEW, SERVERS_OWN] = ""
    """Folder of the registry that keeps the run's module as a version. Empty: `modules` in runs-dir. none: keep no version."""
    run_name: Annotated[str, SERVERS_OWN, a_name(MAX_RUN_CHARS, or_empty=True)] = ""
    """Folder of this run; empty: task and date."""
    resume: Annotated[str, SERVERS_OWN, a_name(MAX_RUN_CHARS, or_empty=True)] = ""
    """Name of a run in runs-dir to continue from its last checkpoint."""
    tracker: Annotated[Literal["none", "tensorboard", "mlflow", "wandb"], ANEW, SERVERS_OWN] = (
        "none"
    )
    """Where the metrics of metrics.jsonl go as well (docs/how-to/track-runs.md)."""

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(unknown_method(value))
        return value

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        return [
            (
                not self.registry and self.run_name.casefold() == MODULES,
                f"run-name={self.run_name} is the folder of the registry of modules; choose another run-name",
            )
        ]

    @property
    def registry_folder(self) -> Path | None:
        """Where the registry of modules is, or will be; None where the run keeps no version."""
        if self.registry == "none":
            return None
        place = Path(self.registry or self.runs_dir).expanduser().absolute()
        return place if self.registry else place / MODULES

    @property
    def method_description(self) -> Method:
        """What the method's name stands for."""
        return METHODS[self.method]


def unknown_method(value: str) -> str:
    """That a method is not known, with the nearest ones that are."""
    return f"method {value[:100]!r} is not known; {suggestion(value, METHODS, 'there are')}"
