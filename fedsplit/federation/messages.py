"""What travels in Flower messages: orders to sites, their answers, and module tensors as Flower arrays.

Activations never do: they go over our own stream (docs/protocol.md). Structured parts are JSON of the
frozen models below, so that both ends check the same schema; tensors are ArrayRecords.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedsplit import __version__
from fedsplit.core.encoder import Grant
from fedsplit.core.errors import ConfigError, FederationError, FedsplitError
from fedsplit.core.foreign import MAX_CLASSES, MAX_NAME_CHARS, ClassName, Name, printable
from fedsplit.core.notes import MAX_NOTE_CHARS, MAX_NOTES
from fedsplit.core.records import RoundMetrics

ORDER, ANSWER, FAULT, MODULE, DELTA = "order", "answer", "fault", "module", "delta"
NOT_HELD = "not-held"
SITE_GONE = "it is not connected any more; look whether its SuperNode runs and reaches the server"
STATISTICS, FIT, HELD_OUT = "statistics", "fit", "held-out"
SCALARS, HISTORY = "scalars", "history"
MAX_JSON_CHARS = 1_000_000
# Counts are weights of the average: they must fit the arithmetic of numpy.
MAX_SAMPLES = 10**12
MAX_FAULT_CHARS = 4000
# What np.save writes for numbers in C order: magic, version 1.0, header length, header. No header of 8 dimensions
# of 12 digits is longer than this, and the pattern has one way alone to match a text.
_NPY_MAGIC, _MAX_NPY_HEADER, _MAX_DIMENSIONS, _MAX_DIGITS = b"\x93NUMPY\x01\x00", 246, 8, 12
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:f[248]|[iu][1248]|b1))', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]*)\), \} *\n"
)
Kind = Literal["roll-call", "statistics", "calibrate", "train", "evaluate", "local-only"]
Tensors = Mapping[str, NDArray[np.float32]]
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

    kind: Kind
    run: str
    round: int
    fedsplit_version: Word
    config: dict[str, str | int | float | bool]
    classes: Classes | None
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
    state_dir: str = ""
    """Simulation only: where the sites of this machine keep what is their own."""


class _Version(BaseModel):
    """The one field that every fedsplit can read of another's order."""

    fedsplit_version: str = Field(max_length=64)


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
    correct_own: int = Field(ge=0, le=MAX_SAMPLES)
    total_own: int = Field(ge=0, le=MAX_SAMPLES)
    correct_everywhere: int = Field(ge=0, le=MAX_SAMPLES)
    total_everywhere: int = Field(ge=0, le=MAX_SAMPLES)


class Fault(_Part):
    """A typed error of a site, in words for people."""

    kind: Word
    message: Annotated[str, AfterValidator(lambda text: printable(text, limit=MAX_FAULT_CHARS))]
    site: Annotated[str, AfterValidator(lambda text: printable(text, limit=MAX_NAME_CHARS))] = ""
    """The site's name where it is known."""


_Model = TypeVar("_Model", bound=BaseModel)


def write(name: str, model: BaseModel) -> RecordDict:
    """A record dict that carries one structured part under `name`."""
    return RecordDict({name: ConfigRecord({"json": model.model_dump_json()})})


def read(content: RecordDict, name: str, model: type[_Model]) -> _Model:
    """The structured part under `name`. Raises FederationError when it is missing or malformed."""
    record = content.config_records.get(name)
    text = record.get("json") if record is not None else None
    if not isinstance(text, str) or len(text) > MAX_JSON_CHARS:
        raise FederationError(
            f"a message has no readable {name!r} part; do both ends run fedsplit?"
        )
    try:
        return model.model_validate_json(text)
    except ValidationError as err:
        first = err.errors()[0]
        raise FederationError(
            f"the {name!r} part of a message is malformed at "
            f"{printable('.'.join(map(str, first['loc'])), limit=100)}: {printable(first['msg'])}; install the same fedsplit version on both ends"
        ) from err


def check_version(content: RecordDict) -> None:
    """Raise ConfigError for an order of another fedsplit. First of all, for such an order may have other fields."""
    record = content.config_records.get(ORDER)
    text = record.get("json") if record is not None else None
    if not isinstance(text, str) or len(text) > MAX_JSON_CHARS:
        return  # `read` says what is wrong with it.
    try:
        theirs = _Version.model_validate_json(text).fedsplit_version
    except ValidationError:
        return
    if theirs != __version__:
        raise ConfigError(
            f"the server runs fedsplit {printable(theirs)}, this site {__version__}; install the same version on both"
        )


def fault_of(message: Message) -> Fault | None:
    """Why a reply is no answer: Flower's own error or the site's; None for a good one."""
    if message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE:
        return Fault(kind="SiteGone", message=SITE_GONE)
    if message.has_error():
        reason = (message.error.reason or "").strip()
        # The end is looked at first: a reason may be as long as its sender likes.
        last = reason[-MAX_FAULT_CHARS:].splitlines()[-1] if reason else ""
        return Fault(
            kind="SiteCrashed", message=printable(last) or f"Flower error {message.error.code}"
        )
    if FAULT in message.content.config_records:
        try:
            return read(message.content, FAULT, Fault)
        except FederationError as err:
            return Fault(kind="FederationError", message=str(err))
    return None


def answer_of(reply: Message, model: type[_Model]) -> _Model:
    """What a site answered. Raises FederationError with the site's fault, or when the answer is malformed."""
    if (fault := fault_of(reply)) is not None:
        raise FederationError(fault.message)
    return read(reply.content, ANSWER, model)


def fault_reply(error: FedsplitError, message: Message, *, site: str) -> Message:
    """The reply of a site that could not do what it was asked."""
    fault = Fault(
        kind=type(error).__name__, message=str(error)[:MAX_FAULT_CHARS], site=site[:MAX_NAME_CHARS]
    )
    return Message(write(FAULT, fault), reply_to=message)


def to_arrays(tensors: Tensors) -> ArrayRecord:
    """Module tensors as a Flower record, in the order of their names."""
    return ArrayRecord(
        {name: Array(np.asarray(tensors[name], order="C")) for name in sorted(tensors)}
    )


def from_arrays(
    content: RecordDict, name: str, wanted: Mapping[str, Shape]
) -> dict[str, NDArray[np.float32]]:
    """The tensors of a record that are there of `wanted` (name -> shape); none when it is not there.

    Raises FederationError for any other array, and for one of another type or shape, before anything is copied.
    """
    record = content.array_records.get(name)
    if record is None:
        return {}
    if extra := [key for key in record if key not in wanted]:
        raise FederationError(
            f"the {name!r} arrays of a message hold {len(extra)} that nobody asked for, e.g. "
            f"{printable(min(extra), limit=200)}; install the same fedsplit version on both ends"
        )
    found = {}
    for key, array in record.items():
        try:
            found[key] = _plain(array, wanted[key])
        except (ValueError, OverflowError) as err:
            raise FederationError(
                f"the {name!r} arrays of a message cannot be read: {key}: {printable(err, limit=300)}"
            ) from err
    return {key: array.copy() for key, array in found.items()}


def _plain(array: Array, wanted: Shape) -> NDArray[np.float32]:
    """A view of the bytes of an array in numpy's own format, of which only what `to_arrays` writes is read.

    np.load would parse the header as Python, open archives, and allocate what the header claims.
    """
    data = array.data
    start = len(_NPY_MAGIC) + 2
    end = start + int.from_bytes(data[start - 2 : start], "little")
    # Capped before it is looked at.
    if array.stype != "numpy.ndarray" or data[: start - 2] != _NPY_MAGIC or end > _MAX_NPY_HEADER:
        raise ValueError("these are not the bytes of a plain array")
    if (head := _NPY_HEADER.fullmatch(data[start:end])) is None:
        raise ValueError("these are not the bytes of a plain array")
    dtype, shape = np.dtype(head[1].decode()), _shape(head[2].decode())
    if dtype != np.float32:
        raise ValueError(f"it is {dtype}, float32 is wanted")
    if shape != tuple(wanted):
        raise ValueError(f"it has shape {shape}, {tuple(wanted)} is wanted")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError(f"{len(data) - end} bytes are not {dtype} of shape {shape}")
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


def _shape(text: str) -> Shape:
    """Read "2, 3" as it stands in a header. Raises ValueError on more than a header may hold."""
    parts = text.replace(",", " ").split()
    if len(parts) > _MAX_DIMENSIONS or any(len(part) > _MAX_DIGITS for part in parts):
        raise ValueError(f"it has a shape of {len(text)} characters")
    return tuple(map(int, parts))


def array_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message as they travel."""
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())
