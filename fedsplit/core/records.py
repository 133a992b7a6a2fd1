"""What a run leaves behind, as typed records: one metrics line a site and round, the status, the summary.

`federation/server/books/run_dir.py` writes them under `runs/<run>/`; `report` and the CLI read them. All sizes are
bytes, all times seconds, all accuracies shares in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedsplit.core.foreign import Name, checked_name

Outcome = Literal["complete", "partial", "failed"]
_WORST_FIRST: tuple[Outcome, ...] = ("failed", "partial", "complete")
Phase = Literal["starting", "waiting", "training", "evaluating", "done", "failed"]


# Bounded, for these numbers come from sites and are added up.
Count = Annotated[int, Field(ge=0, le=2**50)]
Flops = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


Word = Annotated[str, Field(max_length=64), AfterValidator(checked_name)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoundMetrics(_Record):
    """One line of `metrics.jsonl`: what one site did in one round. Round `rounds + 1` only evaluates."""

    round: Count
    site: Name
    cut: Word
    codec: Word
    samples: Count
    """Training samples that the update stands for; 0 when the round only evaluated."""
    test_samples: Count
    correct_global: Count
    """Test samples that the module, as it was before this round's training, got right."""
    correct_personal: Count | None
    """The same after this site's own training; None when it did not train."""
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


class SiteSummary(_Record):
    """One site's row of the summary."""

    name: str
    cut: str
    samples: int
    test_samples: int
    accuracy_before: float | None
    accuracy: float | None
    """The final global module on this site's own test samples."""
    accuracy_personal: float | None
    """The module right after this site's last own training, on its own test samples."""
    accuracy_local_only: float | None
    """Trained on this site's data alone, on the test samples of all sites (own ones in deployment)."""
    accuracy_local_only_personal: float | None
    """Trained on this site's data alone, on its own test samples."""
    bytes_up: int
    bytes_down: int
    seconds_device: float
    seconds_wait: float
    peak_rss_bytes: int
    rounds_missed: int
    flops_device: int = 0
    notes: tuple[str, ...] = ()
    """What the site told at roll call: what it guessed, left out or found odd."""


class LeftOut(_Record):
    """A site that took no part, or not in every round, and why."""

    site: str
    rounds: tuple[int, ...]
    """Rounds it missed; 0 is the roll call before the first round."""
    reason: str


class Summary(_Record):
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
    accuracy_global: float | None
    """The last module on the test samples of all sites that answered."""
    accuracy_global_start: float | None
    """The module before its first round of training."""
    start: Literal["", "zero", "class-means", "ridge", "module"] = ""
    """What the classifier started from: zero, a closed form, or the module of an earlier run. Zero tells nothing apart."""
    accuracy_personal: float | None = None
    """Each site's own model after its last training on its own test samples, over all of them."""
    accuracy_by_round: tuple[float, ...]
    """accuracy_global_start first, then after each round."""
    accuracy_local_only: float | None
    """Mean over the sites of their accuracy_local_only, where it was run."""
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

    @property
    def tested(self) -> int:
        """Test samples behind the accuracy of all: those of the sites that have one."""
        return sum(site.test_samples for site in self.sites if site.accuracy is not None)


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
