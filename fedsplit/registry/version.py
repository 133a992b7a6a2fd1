"""What a registry knows of a module: facts of the run that made it, the version that they became, and each promotion.

Read from files that may come from elsewhere (an imported archive), so every field has its cap.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedsplit.core.foreign import MAX_CLASSES, ClassName, Name, checked_name
from fedsplit.core.names import MAX_TASK_CHARS, RULE, is_name, normalised
from fedsplit.core.records import Count
from fedsplit.core.scores import Target

PRODUCTION, LATEST = "production", "latest"
"""The alias that is in use, and the word for the highest number, which no alias may have."""
MAX_SITES, MAX_RUNS, MAX_TAGS, MAX_ALIASES = 10_000, 1000, 50, 50
MAX_NUMBER = 10**9

_Text = Annotated[str, Field(max_length=1000), AfterValidator(checked_name)]
_Long = Annotated[str, Field(max_length=4000), AfterValidator(checked_name)]
_Score = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ScoreMap = Annotated[dict[Annotated[str, Field(max_length=64)], _Score], Field(max_length=64)]
Setting = str | int | float | bool


def _a_name(value: str) -> str:
    name = normalised(value)
    if not is_name(name, MAX_TASK_CHARS):
        raise ValueError(f"no name: 1 to {MAX_TASK_CHARS} {RULE} are wanted")
    return name


ShortName = Annotated[str, AfterValidator(_a_name)]
"""Of a task, an alias or a tag."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteFacts(_Record):
    """What a site gave to a version, and how the module does on its own test samples."""

    name: Name
    samples: Count = 0
    test_samples: Count = 0
    scores_before: ScoreMap = {}
    """Before the run's first round."""
    scores: ScoreMap = {}
    """At its end; empty where the site was not tested."""
    cut: Annotated[str, Field(max_length=64)] = ""
    rounds_missed: Count = 0

    @property
    def accuracy(self) -> float | None:
        """Of a task with classes: the share of right answers, in [0, 1]."""
        return self.scores.get("accuracy")


class Facts(_Record):
    """What the module's files do not say themselves: the run that made it."""

    task: ShortName
    run: Annotated[str, Field(max_length=200), AfterValidator(checked_name)] = ""
    """The run's name; empty for a module that came without one."""
    outcome: Literal["", "complete", "partial", "failed"] = ""
    fedsplit_version: Annotated[str, Field(max_length=64)] = ""
    created: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = 0.0
    """Seconds since the epoch; 0: now."""
    settings: Annotated[
        dict[Annotated[str, Field(max_length=64)], Setting], Field(max_length=500)
    ] = {}
    """The run's, by their kebab keys."""
    parents: Annotated[tuple[Digest, ...], Field(max_length=16)] = ()
    """Digests of the modules that it was started from."""
    sites: Annotated[tuple[SiteFacts, ...], Field(max_length=MAX_SITES)] = ()
    metrics: ScoreMap = {}
    """Scores over the test samples of all sites; those before the first round with `_before` behind their names."""
    notes: Annotated[tuple[_Long, ...], Field(max_length=200)] = ()
    """What the run guessed, left out or found odd."""


class Run(_Record):
    """A run that made a version's files."""

    name: Annotated[str, Field(max_length=200), AfterValidator(checked_name)]
    created: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class Record(Facts):
    """A version as version.json keeps it."""

    number: Annotated[int, Field(ge=1, le=MAX_NUMBER)]
    """1 for the task's first; never given twice."""
    digest: Digest
    classes: Annotated[tuple[ClassName, ...], Field(max_length=MAX_CLASSES)] = ()
    """Empty for a module of numbers."""
    target: Target = "class"
    kind: Annotated[str, Field(max_length=32)] = ""
    """lora, prompt, adapter, classifier, ..."""
    backbone_sha256: Digest
    backbone: Annotated[str, Field(max_length=500), AfterValidator(checked_name)] = ""
    """Its name at the run: a hint. The digest decides."""
    size_bytes: Count = 0
    """Of all files."""
    runs: Annotated[tuple[Run, ...], Field(max_length=MAX_RUNS)] = ()
    """All runs that made these very files, the first one first."""
    tags: Annotated[tuple[ShortName, ...], Field(max_length=MAX_TAGS)] = ()

    @property
    def name(self) -> str:
        """TASK#NUMBER."""
        return f"{self.task}#{self.number}"


class Version(Record):
    """A version as it stands: with the aliases that point to it."""

    aliases: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """TASK#NUMBER with its aliases, for a person."""
        return f"{self.name} ({', '.join(self.aliases)})" if self.aliases else self.name


class Promotion(_Record):
    """An alias moved."""

    task: ShortName
    alias: ShortName
    digest: Digest
    """Where it points now."""
    previous: Digest | Literal[""] = ""
    """Where it pointed before; empty: it was new."""
    kind: Literal["promote", "rollback"] = "promote"
    by: Annotated[str, Field(max_length=200), AfterValidator(checked_name)] = ""
    why: _Text = ""
    at: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = 0.0
    """Seconds since the epoch."""
    measured: Annotated[
        dict[Annotated[str, Field(max_length=200)], Setting], Field(max_length=MAX_SITES)
    ] = {}
    """What the promotion was decided by, where it was measured."""


def bare(version: Version, **changed: Any) -> Record:
    """A version as version.json keeps it, with what has changed; checked. Raises ValidationError."""
    said = version.model_dump()
    said.pop("aliases")
    return Record.model_validate(said | changed)
