"""What a run leaves behind, as typed records: one metrics line a site and round, the status, the summary.

`federation/server/books/run_dir.py` writes them under `runs/<run>/`; `report` and the CLI read them. All sizes are
bytes, all times seconds, all accuracies shares in [0, 1].

Everybody here reads `scores` and `sums`, whatever the task. In the files of a task with classes these stand under the names
that such files always had, `accuracy...` and `correct...`; a record reads both forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fedsplit.core.foreign import Name, checked_name
from fedsplit.core.scores import (
    SCORINGS,
    Confusion,
    Scores,
    Scoring,
    Sums,
    Tally,
    Target,
    scoring_of,
)

Outcome = Literal["complete", "partial", "failed"]
# In the run's log, each before a record as one line of JSON, for runs whose folder is on another machine.
SUMMARY_MARK, TASKS_MARK = "FEDSPLIT_SUMMARY", "FEDSPLIT_TASKS"
_WORST_FIRST: tuple[Outcome, ...] = ("failed", "partial", "complete")
Phase = Literal["starting", "waiting", "training", "evaluating", "done", "failed"]


# Bounded, for these numbers come from sites and are added up.
Count = Annotated[int, Field(ge=0, le=2**50)]
Flops = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


Word = Annotated[str, Field(max_length=64), AfterValidator(checked_name)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Scored(_Record):
    """A record with a score that has a name of its own in the files of a task with classes."""

    own_names: ClassVar[Mapping[str, str]]
    """Field of the file -> field that holds it under its name within sums or scores."""
    inner: ClassVar[str]
    """The name within."""

    @model_validator(mode="before")
    @classmethod
    def _under_both_names(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        found = dict(raw)
        for own, general in cls.own_names.items():
            if general in found:
                found[own] = _unwrapped(found[general], cls.inner)
            elif found.get(own) is not None:
                found[general] = _wrapped(found[own], cls.inner)
        return found

    @model_serializer(mode="wrap")
    def _in_files(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        for name in ("confusion", "recall"):
            if found.get(name) is None:
                found.pop(name, None)
        if self.scoring.target == "class":
            for general in self.own_names.values():
                del found[general]
            found.pop("target", None)
        return found

    @property
    def scoring(self) -> Scoring:
        """What the scores are, and which of them counts."""
        raise NotImplementedError


def _wrapped(value: Any, name: str) -> Any:
    if isinstance(value, list | tuple):
        return [{name: one} for one in value]
    return {name: value}


def _unwrapped(value: Any, name: str) -> Any:
    if isinstance(value, list | tuple):
        return [one.get(name) for one in value if isinstance(one, Mapping) and name in one]
    return value.get(name) if isinstance(value, Mapping) else None


class RoundMetrics(_Scored):
    """One line of `metrics.jsonl`: what one site did in one round. Round `rounds + 1` only evaluates."""

    round: Count
    site: Name
    cut: Word
    codec: Word
    samples: Count
    """Training samples that the update stands for; 0 when the round only evaluated."""
    test_samples: Count
    sums_global: Sums = Field({})
    """Sums over the test samples, of the module as it was before this round's training."""
    sums_personal: Sums | None = None
    """The same after this site's own training; None when it did not train."""
    correct_global: Count | None = None
    correct_personal: Count | None = None
    """Of a task with classes: the sums' right answers."""
    confusion: Confusion | None = None
    """Of the run's last test, with at most MAX_CONFUSED classes: [label][answer] test samples."""
    loss: Annotated[float, Field(allow_inf_nan=False)] | None
    """Mean training loss of the round; None when it did not train."""
    bytes_activation_up: Count
    bytes_activation_down: Count
    bytes_module_up: Count
    bytes_module_down: Count
    steps: Count
    seconds_device: Seconds
    """Time the device worked itself."""
    seconds_wait: Seconds
    """Time it waited for the encoder."""
    peak_rss_bytes: Count
    flops_device: Flops = 0
    """Floating-point operations of the device's head and tail."""
    process: Word = ""
    """Which of the site's processes it was, by a random word: another one each time that one is started."""
    backbone_loads: Count = 0
    """How often that process read tensors of the backbone from disk for this order."""

    own_names = {"correct_global": "sums_global", "correct_personal": "sums_personal"}
    inner = "correct"

    @property
    def scoring(self) -> Scoring:
        """The sums say which it is."""
        return scoring_of(self.sums_global)

    @property
    def tested(self) -> Tally:
        """The test of the module that came."""
        return Tally.model_construct(sums=self.sums_global, samples=self.test_samples)

    @property
    def tested_personal(self) -> Tally | None:
        """The test after the site's own training; None when it did not train."""
        if self.sums_personal is None:
            return None
        return Tally.model_construct(sums=self.sums_personal, samples=self.test_samples)


class Status(_Record):
    """`status.json`: where the run stands now, rewritten whole at each change."""

    phase: Phase
    round: int
    rounds: int
    sites: tuple[str, ...]
    replied: tuple[str, ...]
    """The sites whose reply of this round is in."""
    message: str = ""
    task: str = ""
    """The task whose turn it is, in a run of several."""


class SiteSummary(_Scored):
    """One site's row of the summary."""

    name: str
    cut: str
    samples: int
    test_samples: int
    target: Target = "class"
    scores_before: Scores | None = None
    scores: Scores | None = None
    """The final global module on this site's own test samples."""
    scores_personal: Scores | None = None
    """The module right after this site's last own training, on its own test samples."""
    scores_local_only: Scores | None = None
    """Trained on this site's data alone, on the test samples of all sites (own ones in deployment)."""
    scores_local_only_personal: Scores | None = None
    """Trained on this site's data alone, on its own test samples."""
    accuracy_before: float | None = None
    accuracy: float | None = None
    accuracy_personal: float | None = None
    accuracy_local_only: float | None = None
    accuracy_local_only_personal: float | None = None
    """Of a task with classes: the scores' accuracy."""
    confusion: Confusion | None = None
    """Of the run's last test on this site's own test samples; None where it was not kept."""
    recall: dict[str, float | None] | None = None
    """Class -> the share of its test samples that was found; None of a class without one."""
    bytes_up: int
    bytes_down: int
    seconds_device: float
    seconds_wait: float
    peak_rss_bytes: int
    rounds_missed: int
    flops_device: int = 0
    backbone_loads: int = 0
    """How often the site loaded its part of the backbone for the run: once a process, and each time again that it had let
    go of it."""
    notes: tuple[str, ...] = ()
    """What the site told at roll call: what it guessed, left out or found odd."""

    own_names = {
        f"accuracy{which}": f"scores{which}"
        for which in ("_before", "", "_personal", "_local_only", "_local_only_personal")
    }
    inner = "accuracy"

    @property
    def scoring(self) -> Scoring:
        """The target's."""
        return SCORINGS[self.target]


class LeftOut(_Record):
    """A site that took no part, or not in every round, and why."""

    site: str
    rounds: tuple[int, ...]
    """Rounds it missed; 0 is the roll call before the first round."""
    reason: str


class Summary(_Scored):
    """`summary.json`: the run in numbers."""

    run: str
    task: str
    method: str
    backbone: str
    backbone_sha256: str
    fedsplit_version: str
    rounds: int
    rounds_done: int
    sites: tuple[SiteSummary, ...]
    target: Target = "class"
    """What a label is. A task with classes has its scores under `accuracy...` in the file, another one under `scores...`."""
    scores: Scores | None = None
    """The last module on the test samples of all sites that answered."""
    scores_start: Scores | None = None
    """The module before its first round of training."""
    scores_personal: Scores | None = None
    """Each site's own model after its last training on its own test samples, over all of them."""
    scores_by_round: tuple[Scores, ...] = ()
    """scores_start first, then after each round."""
    scores_local_only: Scores | None = None
    """Mean over the sites of their scores_local_only, where it was run."""
    accuracy_global: float | None = None
    accuracy_global_start: float | None = None
    start: Literal["", "zero", "class-means", "ridge", "module"] = ""
    """What the classifier started from: zero, a closed form, or the module of an earlier run. Zero tells nothing apart."""
    accuracy_personal: float | None = None
    accuracy_by_round: tuple[float, ...] = ()
    accuracy_local_only: float | None = None
    """Of a task with classes: the scores' accuracy."""
    confusion: Confusion | None = None
    """Of the run's last test over all sites: [label][answer] samples, in the order of config.json's classes."""
    recall: dict[str, float | None] | None = None
    """Class -> recall, over all sites."""
    bytes_activation: int
    bytes_module: int
    flops_device: int = 0
    """Floating-point operations of all devices together."""
    bytes_full_model: int
    """What the same rounds would have moved with the whole model instead of the module."""
    wall_s: float
    outcome: Outcome
    left_out: tuple[LeftOut, ...]
    reason: str
    """Why the run ended as it did, in a sentence; empty when complete."""
    module: str
    """Folder of the trained module, relative to the run's."""
    notes: tuple[str, ...] = ()
    """What the run itself guessed or found odd, such as classes that a start-module does not know."""

    own_names = {
        "accuracy_global": "scores",
        "accuracy_global_start": "scores_start",
        "accuracy_personal": "scores_personal",
        "accuracy_by_round": "scores_by_round",
        "accuracy_local_only": "scores_local_only",
    }
    inner = "accuracy"

    @property
    def scoring(self) -> Scoring:
        """The target's."""
        return SCORINGS[self.target]

    @property
    def untrained(self) -> bool:
        """Did the classifier start from zero? Then it named one class always; of numbers it said their mean."""
        return self.start == "zero" and self.target == "class"

    @property
    def tested(self) -> int:
        """Test samples behind the scores of all: those of the sites that have some."""
        return sum(site.test_samples for site in self.sites if site.scores is not None)


class TasksSummary(_Record):
    """`tasks.json`: how each task of a run of several ended."""

    run: str
    tasks: tuple[Summary, ...]
    """In the order in which the run's settings name them; the files of each are in a folder of its name."""

    @property
    def outcome(self) -> Outcome:
        """Complete only if all tasks are, and failed if any is."""
        outcomes = {task.outcome for task in self.tasks}
        return next((o for o in _WORST_FIRST if o in outcomes), "failed")

    @property
    def reason(self) -> str:
        """Which tasks are not complete, and why; empty when all are."""
        return "; ".join(f"{t.task}: {t.reason}" for t in self.tasks if t.outcome != "complete")
