"""The JSON bodies HELLO, WELCOME and ERROR, and how an error travels: exception -> ERROR frame -> exception.

Both ends use it. Nothing in it touches gRPC.
"""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import fedsplit
from fedsplit.core.encoder import Grant
from fedsplit.core.errors import (
    EncoderError,
    OverloadedError,
    ProtocolError,
    RefusedError,
    UnreachableError,
)
from fedsplit.core.foreign import printable
from fedsplit.transport.frames import MAX_JSON_BYTES, VERSION, FrameKind, Message, json_frame

Code = Literal["refused", "protocol", "overloaded", "unavailable", "internal"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hello(_Body):
    """What the site believes; each field is compared with the token and the host."""

    protocol: int
    fedsplit_version: str = Field(max_length=64)
    backbone_sha256: str = Field(max_length=64)
    a: int = Field(ge=0)
    b: int = Field(ge=0)
    version: str = Field(max_length=128)
    codec: str = Field(max_length=32)

    @classmethod
    def of(cls, grant: Grant, codec: str) -> Hello:
        """What a site of this program says that has this grant."""
        return cls(
            protocol=VERSION,
            fedsplit_version=fedsplit.__version__,
            backbone_sha256=grant.backbone_sha256,
            a=grant.a,
            b=grant.b,
            version=grant.version,
            codec=codec,
        )


class Welcome(_Body):
    """What was agreed: the shapes and limits of the session."""

    session: int = Field(ge=1, lt=1 << 64)
    width: int = Field(ge=1)
    pooled_width: int = Field(ge=1)
    pooled: bool
    max_batch: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    max_steps: int = Field(ge=1)
    max_kept_steps: int = Field(ge=1)
    max_message_bytes: int = Field(ge=1)
    idle_timeout_s: float = Field(gt=0)
    training: Literal["frozen", "hosted", "shared", "zeroth-order"]
    probes: int = Field(ge=0)
    """K, the perturbed forwards of a PROBE; 0 where there are none."""
    inference: bool = False
    """The session predicts: ENCODE without KEEP is all that it takes."""


class ErrorBody(_Body):
    """Why the stream ends."""

    code: Code
    message: str
    retry_after_s: float | None = None


B = TypeVar("B", Hello, Welcome, ErrorBody)


def read_body(model: type[B], message: Message) -> B:
    """Validate a JSON message. Raises ProtocolError that names the faulty fields."""
    try:
        return model.model_validate_json(message.payload.tobytes())
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}"
            for e in error.errors(include_input=False)[:8]
        )
        shown = printable(faults, limit=1000)
        raise ProtocolError(f"{message.header.kind.name} is malformed: {shown}") from error


def error_frame(error: EncoderError, *, session: int) -> bytes:
    """The ERROR frame for an error that the peer may read."""
    body = ErrorBody(
        code=code_of(error),
        message=str(error)[:1000],
        retry_after_s=error.retry_after_s if isinstance(error, OverloadedError) else None,
    )
    text = body.model_dump_json()
    if len(text.encode()) > MAX_JSON_BYTES:  # a message of 1000 characters that JSON escapes
        text = body.model_copy(update={"message": ascii(body.message)[:1000]}).model_dump_json()
    return json_frame(FrameKind.ERROR, text, session=session)


def code_of(error: EncoderError) -> Code:
    """The wire's name for an error."""
    if isinstance(error, RefusedError):
        return "refused"
    if isinstance(error, ProtocolError):
        return "protocol"
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, UnreachableError):
        return "unavailable"
    return "internal"


def error_of(body: ErrorBody, address: str) -> EncoderError:
    """The exception that an ERROR frame stands for, at the site."""
    text = f"the encoder at {address} ended the session: {printable(body.message, limit=1000)}"
    if body.code == "overloaded":
        return OverloadedError(text, retry_after_s=body.retry_after_s or 1.0)
    kinds: dict[str, type[EncoderError]] = {
        "refused": RefusedError,
        "protocol": ProtocolError,
        "unavailable": UnreachableError,
    }
    return kinds.get(body.code, EncoderError)(text)
