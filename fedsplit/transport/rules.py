"""What a session at the encoder allows: the checks of HELLO and of each message's first header.

Pure: no threads, no gRPC, nothing allocated. `Rules.admit` runs in the session's reader thread, `keep` and
`release` in its worker (session.py); both only touch the dict of kept steps with single operations.
"""

from __future__ import annotations

from typing import NamedTuple

from fedsplit.core import directions
from fedsplit.core.encoder import Capabilities, Grant
from fedsplit.core.errors import ConfigError, ProtocolError, RefusedError
from fedsplit.transport.admission import Limits
from fedsplit.transport.codec import Codec, CodecId, Dims, Dtype, find_codec
from fedsplit.transport.frames import JSON_KINDS, VERSION, Flag, FrameKind, Header, check_json
from fedsplit.transport.messages import Hello, Welcome
from fedsplit.transport.shapes import (
    check_batch,
    check_h_dims,
    check_losses,
    check_payload,
    check_probed_size,
)

FLAGS = {
    FrameKind.HELLO: Flag.NONE,
    FrameKind.MASK: Flag.NONE,
    FrameKind.ENCODE: Flag.KEEP | Flag.MASK,
    FrameKind.BACKPROP: Flag.QUIET,
    FrameKind.PROBE: Flag.MASK,
    FrameKind.SCORE: Flag.NONE,
}
"""What a site may send, and with which flags."""


class KeptStep(NamedTuple):
    """A step whose graph the host holds."""

    h_dims: Dims
    z_dims: Dims
    graph_bytes: int


def agree(
    hello: Hello, grant: Grant, offers: Capabilities, limits: Limits, session: int
) -> Welcome:
    """The session's terms. Raises RefusedError that names everything that does not fit, with both values."""
    pairs = (
        ("protocol version", hello.protocol, VERSION),
        ("fedsplit version", hello.fedsplit_version, offers.fedsplit_version),
        ("token's fedsplit version", grant.fedsplit_version, offers.fedsplit_version),
        ("backbone sha256", hello.backbone_sha256, offers.backbone_sha256),
        ("token's backbone sha256", grant.backbone_sha256, offers.backbone_sha256),
    )
    faults = [
        f"{what} is {got}, the encoder's is {want}" for what, got, want in pairs if got != want
    ]
    if (hello.a, hello.b) != (grant.a, grant.b):
        faults.append(f"cut is {hello.a},{hello.b}, the token's is {grant.a},{grant.b}")
    if hello.version != grant.version:
        faults.append(f"module version is {hello.version!r}, the token's is {grant.version!r}")
    if not grant.a < grant.b <= offers.blocks:
        faults.append(
            f"cut {grant.a},{grant.b} leaves the encoder nothing to run or ends beyond block {offers.blocks}"
        )
    try:
        find_codec(hello.codec)
    except ConfigError as error:
        faults.append(str(error))
    if faults:
        raise RefusedError("the session does not fit: " + "; ".join(faults))
    return Welcome(
        session=session,
        width=offers.width,
        pooled_width=offers.pooled_width,
        pooled=grant.cut.pooled(offers.blocks),
        max_batch=grant.max_batch,
        max_tokens=grant.max_tokens,
        max_steps=grant.max_steps,
        max_kept_steps=limits.max_kept_steps,
        max_message_bytes=limits.max_message_bytes,
        idle_timeout_s=limits.idle_timeout_s,
        training=grant.training.mode if grant.training else "frozen",
        probes=_probes(grant),
        inference=grant.inference is not None,
    )


def _probes(grant: Grant) -> int:
    training = grant.training
    if training is None or training.mode != "zeroth-order":
        return 0
    return len(directions.points(training.estimator, training.queries))


def _check_forward(header: Header) -> None:
    """Raise RefusedError for what is more than a forward: a session that predicts leaves nothing at the encoder."""
    if header.kind in (FrameKind.MASK, FrameKind.ENCODE) and not header.flags & Flag.KEEP:
        return
    kept = " with KEEP" if header.flags & Flag.KEEP else ""
    raise RefusedError(
        f"{header.kind.name}{kept} of step {header.step}: the token is one to predict, so ENCODE without KEEP is all that it "
        "allows; what trains needs the token of a run"
    )


class Rules:
    """One session's state as far as it decides which frame may come next."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._welcome: Welcome | None = None
        self._codec: Codec | None = None
        self._greeted = False
        self._last_step = -1
        self._mask: tuple[int, Dims] | None = None
        self.kept: dict[int, KeptStep] = {}
        self.probed: set[int] = set()
        """Steps whose losses are awaited."""

    def welcome(self, welcome: Welcome, codec: Codec) -> None:
        """From now on steps are allowed."""
        self._codec, self._welcome = codec, welcome

    def admit(self, header: Header) -> None:
        """Raise unless this message may come now. Called with its first header, before allocation."""
        kind = header.kind
        if kind not in FLAGS:
            raise ProtocolError(f"{kind.name} is not a site's to send")
        if header.flags & ~FLAGS[kind]:
            raise ProtocolError(
                f"{kind.name} came with flags {header.flags:#04x}, not for its kind"
            )
        if kind in JSON_KINDS:
            self._admit_hello(header)
            return
        if self._welcome is None or self._codec is None:
            raise ProtocolError(
                f"{kind.name} came before the session was opened: HELLO, then wait for WELCOME"
            )
        if header.session != self._welcome.session:
            raise ProtocolError(
                f"{kind.name} is for session {header.session:#x}, this is another one"
            )
        if self._welcome.inference:
            _check_forward(header)
        if self._mask is not None and kind not in (FrameKind.ENCODE, FrameKind.PROBE):
            raise ProtocolError(f"{kind.name} came between MASK and its step")
        if kind is FrameKind.MASK:
            self._admit_mask(header, self._welcome)
        elif kind is FrameKind.ENCODE:
            self._admit_encode(header, self._welcome, self._codec)
        elif kind is FrameKind.PROBE:
            self._admit_probe(header, self._welcome, self._codec)
        elif kind is FrameKind.SCORE:
            self._admit_score(header, self._welcome)
        else:
            self._admit_backprop(header, self._welcome, self._codec)

    def keep(self, step: int, h_dims: Dims, out_dims: Dims, graph_bytes: int) -> None:
        """Note a step whose graph the host will hold."""
        self.kept[step] = KeptStep(h_dims, out_dims, graph_bytes)

    def check_keep(self, step: int) -> None:
        """Raise RefusedError when too many steps are kept already."""
        if len(self.kept) >= self._limits.max_kept_steps:
            raise RefusedError(
                f"step {step} cannot be kept: {len(self.kept)} steps wait for their gradient, "
                f"{self._limits.max_kept_steps} are allowed; backprop them first"
            )

    def release(self, step: int) -> KeptStep:
        """Take a kept step out. Raises ProtocolError when there is none."""
        kept = self.kept.pop(step, None)
        if kept is None:
            raise ProtocolError(
                f"BACKPROP of step {step}: it is not kept, or its gradient was already taken"
            )
        return kept

    def await_losses(self, step: int) -> None:
        """Note a probed step. Raises RefusedError when too many are already."""
        if len(self.probed) >= self._limits.max_kept_steps:
            raise RefusedError(
                f"step {step} cannot be probed: {len(self.probed)} steps wait for their losses, which is all that is "
                "allowed; score them first"
            )
        self.probed.add(step)

    def scored(self, step: int) -> None:
        """Take a probed step out. Raises ProtocolError when there is none."""
        self._check_probed(step)
        self.probed.discard(step)

    def _admit_hello(self, header: Header) -> None:
        if self._greeted:
            raise ProtocolError("a second HELLO: one a stream is allowed")
        self._greeted = True
        check_json(header)

    def _admit_mask(self, header: Header, welcome: Welcome) -> None:
        self._check_order(header)
        if (
            header.dtype is not Dtype.BOOL
            or header.codec is not CodecId.RAW
            or len(header.dims) != 2
        ):
            raise ProtocolError("a mask must be BOOL, RAW and of shape [batch, tokens]")
        check_batch(*header.dims, welcome)
        if header.total != header.dims[0] * header.dims[1]:
            raise ProtocolError(f"a mask of shape {header.dims} has {header.total} payload bytes")
        self._mask = (header.step, header.dims)

    def _admit_encode(self, header: Header, welcome: Welcome, codec: Codec) -> None:
        if header.flags & Flag.KEEP and welcome.training == "zeroth-order":
            raise RefusedError(
                f"ENCODE step {header.step} with KEEP: a zeroth-order session takes no gradient; PROBE it"
            )
        self._admit_h(header, welcome, codec)

    def _admit_probe(self, header: Header, welcome: Welcome, codec: Codec) -> None:
        if not welcome.probes:
            raise RefusedError(
                f"PROBE step {header.step}: the token's training is {welcome.training}, zeroth-order is wanted"
            )
        self._admit_h(header, welcome, codec)
        check_probed_size(header.dims, welcome, codec)

    def _admit_score(self, header: Header, welcome: Welcome) -> None:
        self._check_probed(header.step)
        check_losses(header, welcome)

    def _admit_h(self, header: Header, welcome: Welcome, codec: Codec) -> None:
        self._check_order(header)
        check_h_dims(header.dims, welcome)
        mask, self._mask = self._mask, None
        wanted = (header.step, header.dims[:2]) if header.flags & Flag.MASK else None
        if mask != wanted:
            raise ProtocolError(
                f"{header.kind.name} step {header.step} of shape {header.dims} does not go with its mask: "
                f"(step, shape) is {mask}, {wanted} is wanted"
            )
        check_payload(header, codec, self._limits.max_message_bytes)
        self._last_step = header.step

    def _admit_backprop(self, header: Header, welcome: Welcome, codec: Codec) -> None:
        if header.flags & Flag.QUIET and welcome.training == "frozen":
            raise RefusedError(
                f"BACKPROP step {header.step} with QUIET: nothing trains at the encoder, so nobody would use it"
            )
        kept = self.kept.get(header.step)
        if kept is None:
            raise ProtocolError(
                f"BACKPROP of step {header.step}: it is not kept, or its gradient was already taken"
            )
        if header.dims != kept.z_dims:
            raise ProtocolError(
                f"BACKPROP of step {header.step} has shape {header.dims}: {kept.z_dims} is wanted"
            )
        check_payload(header, codec, self._limits.max_message_bytes)

    def _check_probed(self, step: int) -> None:
        if step not in self.probed:
            raise ProtocolError(
                f"SCORE of step {step}: it was not probed, or its losses were already taken"
            )

    def _check_order(self, header: Header) -> None:
        if header.step <= self._last_step:
            raise ProtocolError(
                f"{header.kind.name} step {header.step} came after step {self._last_step}: steps increase"
            )
