"""The task and its samples: where they come from, how they are read, and how a simulation deals them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedsplit.core.config.flat import is_number
from fedsplit.core.config.section import Check, Section, a_name, read_by
from fedsplit.core.foreign import MAX_CLASS_CHARS, MAX_CLASSES, checked_name
from fedsplit.core.names import MAX_TASK_CHARS
from fedsplit.core.scores import NUMBER, Target
from fedsplit.core.tasks import parse_classes, parse_holders, parse_tasks

PARTITIONS = "iid, dirichlet:ALPHA, pathological:CLASSES or quantity:ALPHA"


class TaskSection(Section):
    """The task and its samples."""

    name: Annotated[str, a_name(MAX_TASK_CHARS)] = Field(default="digits", alias="task")
    """Name of the task: in tokens, summaries and the run's folder."""
    data: str = "digits"
    """digits | folder:PATH | csv:PATH | jsonl:PATH | npz:PATH | hf:NAME. A site's node config overrides it."""
    tasks: Annotated[str, read_by(parse_tasks)] = ""
    """Several tasks "NAME=SOURCE;NAME=SOURCE" that take turns on one encoder; empty: one task, from task and data."""
    task_holders: Annotated[str, read_by(parse_holders)] = ""
    """Simulation: which sites hold a task, by number, "NAME:0-3;NAME:2,5". All sites hold a task that is not named."""
    target: Target = "class"
    """What the label is: the name of a class, or a number to predict (regression)."""
    classes: str = ""
    """The task's classes, comma-separated; empty: the union of the sites' class names."""
    text_column: str = Field(default="text", min_length=1)
    """The column of a csv, jsonl or hf source that holds the text."""
    label_column: str = Field(default="label", min_length=1)
    """The column that holds the label."""
    pixel_max: float = Field(default=0.0, ge=0, le=2**32, allow_inf_nan=False)
    """The pixel value that is white in all images of a source; 0: found from the images and reported. A site's node config overrides it."""
    broken_files: Literal["refuse", "leave-out"] = "refuse"
    """What a site does if it cannot read some image files: refuse names them and takes no part; leave-out goes on without them."""
    image_size: int = Field(default=0, ge=0, le=2048)
    """Side of the images in pixels; 0: the size that the backbone was trained with."""
    max_length: int = Field(default=128, ge=4, le=8192)
    """Longest text in tokens. Longer texts are cut."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of a site's samples that it keeps for testing."""
    max_samples: int = Field(default=0, ge=0)
    """Use at most this many samples of the source; 0: all."""
    max_site_samples: int = Field(default=0, ge=0)
    """Simulation: a site keeps at most this many of the samples dealt to it; 0: all."""
    partition: str = "dirichlet:0.3"
    """How simulation deals one source to the sites. Deployed sites have their own data."""

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

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        strange = sorted(self.holders.keys() - self.sources.keys())
        return [
            (
                bool(strange),
                f"task-holders names {', '.join(strange)}, the run's tasks are {', '.join(self.sources)}; name those",
            ),
            (
                bool(self.tasks) and bool(self.classes),
                f"classes={self.classes[:100]} are those of one task; with tasks leave them out, each has its sites' own",
            ),
            *self._of_numbers(),
        ]

    def _of_numbers(self) -> list[Check]:
        """What speaks of classes where labels are numbers."""
        number = self.target == "number"
        return [
            (
                number and bool(self.classes),
                f"classes={self.classes[:100]} with target=number: a number has no class; leave classes out",
            ),
            (
                number and self.partition.partition(":")[0] in ("dirichlet", "pathological"),
                f"partition={self.partition} deals by class; with target=number use iid or quantity:ALPHA",
            ),
            (
                number and bool(self.tasks),
                "tasks with target=number is not offered; run one task of numbers at a time",
            ),
        ]

    @property
    def stand_in(self) -> tuple[str, ...]:
        """Names of outputs, as many as show whether a module fits, before the classes are known."""
        return ("a", "b") if self.target == "class" else NUMBER

    @property
    def sources(self) -> dict[str, str]:
        """Task -> source: those of `tasks`, else the one of `task` and `data`."""
        return parse_tasks(self.tasks) or {self.name: self.data}

    @property
    def holders(self) -> dict[str, frozenset[int]]:
        """Task -> numbers of the simulated sites that hold it, for the tasks that not all sites hold."""
        return parse_holders(self.task_holders)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The declared classes, or None when the sites' union is to be used."""
        return parse_classes(self.classes) or None
