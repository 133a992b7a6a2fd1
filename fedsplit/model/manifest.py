"""What a backbone is made of: every stored tensor and small file with its digest, and one digest over all of them.

How the tensors lie in files does not matter: a checkpoint in other shards, or as parts in a store, has the same
manifest. Needs no torch. What prepares inputs has a digest of its own, which digest.py computes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import MAX_JSON_BYTES, checked_name, parse_json, printable
from fedsplit.model.files import (
    CONFIG,
    MANIFEST,
    Stamp,
    is_small_file,
    small_files,
    stamp,
    weight_files,
)

FORMAT = 1
HALF = 32
"""Digits of each half of a backbone's digest: the model, what prepares its inputs."""
# The types of safetensors whose values are whole bytes.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_TENSORS = 100_000
MAX_TENSOR_BYTES = 2**40
MAX_FILE_BYTES = 256 * 2**20
_CHUNK = 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredTensor(_Model):
    """A tensor as it is stored: its name there, which may be an older one than in memory."""

    name: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(checked_name)]
    dtype: Annotated[str, Field(max_length=20)]
    """As safetensors writes it, e.g. F32."""
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=16)]
    bytes: Annotated[int, Field(ge=0, le=MAX_TENSOR_BYTES)]
    sha256: Sha256

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype {printable(self.dtype, limit=20)} is none of a stored tensor")
        if math.prod(self.shape) * DTYPE_BYTES[self.dtype] != self.bytes:
            raise ValueError(f"{self.bytes} bytes are not those of its shape and dtype")
        return self


def _checked_file(name: str) -> str:
    if not is_small_file(name):
        raise ValueError("it is no file that a backbone's inputs need")
    return name


class StoredFile(_Model):
    """config.json, or a file that prepares inputs."""

    name: Annotated[str, Field(max_length=100), AfterValidator(_checked_file)]
    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


class Manifest(_Model):
    """A backbone's parts. Both lists are in the order of names, so that equal backbones have equal bytes."""

    format: Literal[1] = 1
    inputs: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """The half of the digest that says what the files make of an input."""
    files: Annotated[tuple[StoredFile, ...], Field(max_length=100)]
    tensors: Annotated[tuple[StoredTensor, ...], Field(max_length=MAX_TENSORS)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for found in (self.files, self.tensors):
            names = [part.name for part in found]
            if names != sorted(set(names)):
                raise ValueError("names stand twice or out of order")
        if not any(file.name == CONFIG for file in self.files):
            raise ValueError(f"{CONFIG} is missing")
        return self

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read what `canonical` wrote. Raises BackboneError."""
        try:
            return cls.model_validate(parse_json(text, limit=MAX_JSON_BYTES))
        except ValidationError as err:
            first = err.errors()[0]
            place = ".".join(printable(part, limit=60) for part in first["loc"])
            raise BackboneError(
                f"a backbone's manifest is damaged or of another fedsplit ({place}: {printable(first['msg'])}); "
                f"format {FORMAT} is wanted"
            ) from err
        except ValueError as err:
            raise BackboneError(
                f"a backbone's manifest cannot be read ({printable(err)}); JSON of format {FORMAT} is wanted"
            ) from err

    def canonical(self) -> bytes:
        """The manifest as JSON, the same bytes everywhere."""
        return _canonical(self.model_dump(mode="json"))

    @cached_property
    def sha256(self) -> str:
        """The backbone's digest: 32 digits over configuration and tensors, 32 of what prepares inputs."""
        config = next(file.sha256 for file in self.files if file.name == CONFIG)
        tensors = [[t.name, t.dtype, list(t.shape), t.sha256] for t in self.tensors]
        model = _canonical({"format": self.format, "config": config, "tensors": tensors})
        return hashlib.sha256(model).hexdigest()[:HALF] + self.inputs


def _canonical(said: Any) -> bytes:
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest that a partial folder holds. Raises BackboneError."""
    return _read(path, stamp(path))


@lru_cache(maxsize=8)
def _read(path: Path, state: Stamp) -> Manifest:
    del state
    try:
        with (path / MANIFEST).open("rb") as file:
            return Manifest.parse(file.read(MAX_JSON_BYTES + 1))
    except OSError as err:
        raise BackboneError(
            f"backbone {path}: its {MANIFEST} cannot be read ({err}); fetch or copy the folder again"
        ) from err


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: these bytes of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    bytes: int


def spans(path: Path) -> list[Span]:
    """All tensors of a whole folder, file by file. Reads headers alone. Raises BackboneError."""
    return [span for file in weight_files(path) for span in _spans(path, file)]


def _spans(path: Path, file: Path) -> Iterator[Span]:
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
        # safetensors itself refuses files in which headers and sizes do not fit, or tensors leave gaps.
        with safe_open(file, framework="numpy") as handle:
            offset = 8 + struct.unpack("<Q", start)[0]
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPE_BYTES:
                    raise BackboneError(
                        f"backbone {path}: {printable(name)} is stored as {dtype}, whose values are no whole bytes; use "
                        f"the checkpoint in float16, bfloat16 or float32 that it was made from"
                    )
                size = math.prod(shape) * DTYPE_BYTES[dtype]
                yield Span(name, dtype, shape, file, offset, size)
                offset += size
    except (SafetensorError, OSError, struct.error) as err:
        raise BackboneError(
            f"backbone {path}: its weights cannot be read ({err}); copy the files again"
        ) from err


def stored_tensors(path: Path) -> tuple[StoredTensor, ...]:
    """All tensors of a whole folder with their digests: one read of its weights. Raises BackboneError."""
    found: dict[str, StoredTensor] = {}
    try:
        for span in spans(path):
            about = {k: getattr(span, k) for k in ("name", "dtype", "shape", "bytes")}
            tensor = StoredTensor(**about, sha256=digest_of(span.file, span.offset, span.bytes))
            if found.setdefault(span.name, tensor) != tensor:
                raise BackboneError(
                    f"backbone {path}: two of its files hold a tensor {printable(span.name)}, and not the same; "
                    f"save the model again"
                )
    except (OSError, ValidationError) as err:
        raise BackboneError(
            f"backbone {path}: its weights cannot be read ({printable(err)}); copy the files again"
        ) from err
    return tuple(found[name] for name in sorted(found))


def stored_files(path: Path) -> tuple[StoredFile, ...]:
    """config.json and what prepares inputs, with their digests. Raises BackboneError."""
    try:
        return tuple(
            StoredFile(
                name=f.name, bytes=f.stat().st_size, sha256=digest_of(f, 0, f.stat().st_size)
            )
            for f in small_files(path)
        )
    except (OSError, ValidationError) as err:
        raise BackboneError(
            f"backbone {path}: its files cannot be read ({printable(err)}); config.json and files that prepare inputs "
            f"have at most {MAX_FILE_BYTES >> 20} MB each"
        ) from err


def digest_of(file: Path, offset: int, size: int) -> str:
    """sha256 of `size` bytes of a file. Raises OSError where it is shorter."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as handle:
        handle.seek(offset)
        while size:
            got = handle.readinto(buffer[: min(size, _CHUNK)])
            if not got:
                raise OSError(f"{file.name} ends too early")
            digest.update(buffer[:got])
            size -= got
    return digest.hexdigest()
