"""Orders and answers as Flower messages: structured parts are JSON of core/orders.py's models, tensors are ArrayRecords."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from fedsplit import __version__
from fedsplit.core.aggregation import Tensors
from fedsplit.core.errors import ConfigError, FederationError, FedsplitError
from fedsplit.core.foreign import MAX_NAME_CHARS, printable
from fedsplit.core.orders import MAX_FAULT_CHARS, Fault, Shape, npy_header

ORDER, ANSWER, FAULT, NOT_HELD = "order", "answer", "fault", "not-held"
SITE_GONE = "it is not connected any more; look whether its SuperNode runs and reaches the server"
MAX_JSON_CHARS = 1_000_000
_STYPE = "numpy.ndarray"
_JOINT = "\n"
"""Between the names of tensors that travel as one array."""
# What np.save writes for numbers in C order: magic, version 1.0, header length, header. No header of 8 dimensions
# of 12 digits is longer than this, and the pattern has one way alone to match a text.
_NPY_MAGIC, _MAX_NPY_HEADER, _MAX_DIMENSIONS, _MAX_DIGITS = b"\x93NUMPY\x01\x00", 246, 8, 12
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:f[248]|[iu][1248]|b1))', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]*)\), \} *\n"
)


class _Version(BaseModel):
    """The one field that every fedsplit can read of another's order."""

    fedsplit_version: str = Field(max_length=64)


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


def packed(tensors: Tensors) -> ArrayRecord:
    """The same as one array, flat, under all their names: for messages that travel.

    Flower moves each array by requests of its own, two at the SuperLink and two at the SuperNode, and each costs the SuperLink
    some 15 ms: with ten sites and 20 tensors that is longer than a short round.
    """
    if len(tensors) < 2:
        return to_arrays(tensors)
    names = sorted(tensors)
    parts = [np.ascontiguousarray(tensors[n], np.float32).reshape(-1) for n in names]
    count = sum(part.size for part in parts)
    # No array of all: of a whole model that would be one copy more.
    data = b"".join([npy_header((count,)), *(part.data.cast("B") for part in parts if part.size)])
    return ArrayRecord({_JOINT.join(names): Array("float32", (count,), _STYPE, data)})


def from_arrays(
    content: RecordDict, name: str, wanted: Mapping[str, Shape]
) -> dict[str, NDArray[np.float32]]:
    """The tensors of a record that are there of `wanted` (name -> shape); none when it is not there.

    Each array is one tensor, or several of them as `packed` writes them. Raises FederationError for any other array, and
    for one of another type or shape, before anything is copied.
    """
    record = content.array_records.get(name)
    if record is None:
        return {}
    most = sum(map(len, wanted)) + len(wanted)
    names = {key: key.split(_JOINT) if len(key) <= most else [key] for key in record}
    told = [one for several in names.values() for one in several]
    if extra := [one for one in told if one not in wanted]:
        raise FederationError(
            f"the {name!r} arrays of a message hold {len(extra)} that nobody asked for, e.g. "
            f"{printable(min(extra), limit=200)}; install the same fedsplit version on both ends"
        )
    if len(set(told)) != len(told):
        raise FederationError(
            f"the {name!r} arrays of a message name {len(told) - len(set(told))} twice; install the same fedsplit version on "
            f"both ends"
        )
    found: dict[str, NDArray[np.float32]] = {}
    for key, array in record.items():
        shapes = {one: tuple(wanted[one]) for one in names[key]}
        sizes = [math.prod(shape) for shape in shapes.values()]
        whole = (sum(sizes),) if len(shapes) > 1 else shapes[key]
        try:
            flat = _plain(array, whole).reshape(-1)
        except (ValueError, OverflowError) as err:
            raise FederationError(
                f"the {name!r} arrays of a message cannot be read: {printable(key, limit=200)}: {printable(err, limit=300)}"
            ) from err
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        found |= {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
    return {key: array.copy() for key, array in found.items()}


def _plain(array: Array, wanted: Shape) -> NDArray[np.float32]:
    """A view of the bytes of an array in numpy's own format, of which only what `to_arrays` writes is read.

    np.load would parse the header as Python, open archives, and allocate what the header claims.
    """
    data = array.data
    start = len(_NPY_MAGIC) + 2
    end = start + int.from_bytes(data[start - 2 : start], "little")
    # Capped before it is looked at.
    if array.stype != _STYPE or data[: start - 2] != _NPY_MAGIC or end > _MAX_NPY_HEADER:
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
