"""What a site is asked and what it answers, as plain data: both ends check the same models.

How they travel is federation/messages.py's (Flower records) or whoever else carries them. Activations are not in
them: they go over our own stream (docs/protocol.md).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedsplit.core.aggregation import Tensors
from fedsplit.core.encoder import Grant
from fedsplit.core.foreign import MAX_CLASSES, MAX_NAME_CHARS, ClassName, Name, printable
from fedsplit.core.notes import MAX_NOTE_CHARS, MAX_NOTES
from fedsplit.core.records import RoundMetrics
from fedsplit.core.scores import Scale, Spread, Tally

# Groups of arrays that travel beside an order or an answer.
MODULE, DELTA, STATISTICS, SCALARS, HISTORY = "module", "delta", "statistics", "scalars", "history"
# The halves of a site's feature statistics.
FIT, HELD_OUT = "fit", "held-out"
# Counts are weights of the average: they must fit the arithmetic of numpy.
MAX_SAMPLES = 10**12
MAX_FAULT_CHARS = 4000
OrderKind = Literal["roll-call", "statistics", "calibrate", "train", "evaluate", "local-only"]
Shape = tuple[int, ...]


Word = Annotated[str, Field(max_length=128), AfterValidator(printable)]
"""A short word: a cut, a digest, a version."""
Classes = Annotated[tuple[ClassName, ...], Field(max_length=MAX_CLASSES)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Stream(_Part):
    """How a site reaches the encoder in this round."""

    address: str
    token: str
    grant: Grant
    tls: bool
    ca_file: str


class Round(_Part):
    """A round that a site is to replay: whose scalars, of how many samples, and for how many they count."""

    number: int
    sites: tuple[tuple[Name, int, int], ...] = Field(max_length=100_000)


class Order(_Part):
    """What a site is to do."""

    kind: OrderKind
    run: str
    round: int
    fedsplit_version: Word
    config: dict[str, str | int | float | bool]
    classes: Classes | None
    scale: Scale | None = None
    """What the sites' numbers are scaled by, where labels are numbers and the sites have said where theirs lie."""
    cut: str
    rank: int = Field(ge=1, le=1024)
    """The site's LoRA rank."""
    backbone_sha256: str
    stream: Stream | None
    """None where nothing runs on the server, and at roll call."""
    encoder_digest: str = ""
    """Digest of the module's tensors that the site does not hold: what its activations depend on beside its own."""
    held: int = -1
    """The round whose module the site kept and is to start from by replaying `history`; -1: the module came."""
    history: tuple[Round, ...] = ()
    module_digest: str = ""
    """Digest of what the replay must arrive at."""
    deadline_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Seconds from the message's making within which an answer counts; 0: the site need not look at its clock."""
    run_key: Word = ""
    """A word that the run keeps when it is resumed, and that no other one of the same name has."""
    state_dir: str = ""
    """Simulation only: where the sites of this machine keep what is their own."""


class RollCall(_Part):
    """What a site says of itself before the first round."""

    site: Name
    cut: Word
    """The site's own cut; empty: the run's."""
    classes: Classes
    samples: int = Field(ge=1, le=MAX_SAMPLES)
    test_samples: int = Field(ge=0, le=MAX_SAMPLES)
    backbone_sha256: Word
    fedsplit_version: Word
    versions: dict[Word, Word] = Field({}, max_length=16)
    """What is installed at the site and decides its numbers: core/versions.py's `installed`."""
    number: int
    """Its partition's number in simulation, -1 in deployment: decides the order in which cuts are dealt."""
    rank: int = Field(0, ge=0, le=1024)
    """The site's own LoRA rank; 0: the run's."""
    pixel_max: Annotated[float, Field(ge=0, le=2**32, allow_inf_nan=False)] = 0.0
    """The value that is white in its images; 0 for texts."""
    spread: Spread | None = None
    """Where the numbers of its training samples lie; None where labels are classes."""
    notes: tuple[
        Annotated[str, Field(max_length=MAX_NOTE_CHARS), AfterValidator(printable)], ...
    ] = Field((), max_length=MAX_NOTES)
    """What the site guessed, left out or found odd in its data and backbone, a sentence each."""


class NotHeld(_Part):
    """What a site says at roll call of a task that is none of its own."""

    site: Name
    task: str = Field(min_length=1, max_length=64)


class Answer(_Part):
    """What a site says after a round."""

    metrics: RoundMetrics
    rank: int = Field(default=0, ge=0, le=1024)
    """The site's LoRA rank from the next round on, where it pruned its own; 0: as it was."""


class Calibration(_Part):
    """How a site's training samples like a closed-form classifier at several temperatures."""

    site: Name
    nll: tuple[float, ...] = Field(max_length=256)
    """Summed negative log-likelihood, one a temperature."""
    metrics: RoundMetrics


class LocalOnly(_Part):
    """What training alone reached."""

    site: Name
    own: Tally
    """On its own test samples."""
    everywhere: Tally
    """On those of all sites, where they are to be had."""


class Fault(_Part):
    """A typed error of a site, in words for people."""

    kind: Word
    message: Annotated[str, AfterValidator(lambda text: printable(text, limit=MAX_FAULT_CHARS))]
    site: Annotated[str, AfterValidator(lambda text: printable(text, limit=MAX_NAME_CHARS))] = ""
    """The site's name where it is known."""


class Incoming(Protocol):
    """The arrays that came with an order: read once their names and shapes are known, never before."""

    @property
    def bytes(self) -> int:
        """Bytes of all of them as they travelled."""
        ...

    def arrays(self, group: str, wanted: Mapping[str, Shape]) -> dict[str, NDArray[np.float32]]:
        """The arrays of `group` that are there of `wanted` (name -> shape). Raises FederationError for any other."""
        ...


@dataclass(frozen=True)
class Outgoing:
    """What a site answers: one structured part, and groups of arrays."""

    part: RollCall | NotHeld | Answer | Calibration | LocalOnly
    arrays: Mapping[str, Tensors] = field(default_factory=dict)


def travelling_bytes(groups: Mapping[str, Tensors]) -> int:
    """Bytes of these arrays as they travel: numpy's own format, header and all. Those of a group travel as one."""
    return sum(_group_bytes(list(tensors.values())) for tensors in groups.values() if tensors)


def npy_header(shape: Shape) -> bytes:
    """What numpy writes before the numbers of a float32 array in C order."""
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _group_bytes(arrays: list[NDArray[Any]]) -> int:
    shape = arrays[0].shape if len(arrays) == 1 else (sum(a.size for a in arrays),)
    return len(npy_header(shape)) + sum(a.nbytes for a in arrays)
