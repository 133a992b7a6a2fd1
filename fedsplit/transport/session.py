"""One site's session at the encoder: a reader thread that puts messages together, and a worker that answers.

`Session.run` is the response iterator that gRPC drives in one of the server's threads (server.py). The reader works at most
two messages ahead of it, so that receiving overlaps computing; the rest waits in gRPC's flow control.
Whatever ends a session, its Encoder is closed.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

import grpc

from fedsplit.core.encoder import Array, Encoder, EncoderHost, HostedEncoder, Mask
from fedsplit.core.errors import EncoderError, UnreachableError
from fedsplit.core.foreign import printable
from fedsplit.transport.admission import Admission
from fedsplit.transport.codec import Codec, Dims, check_range, decode_mask, find_codec
from fedsplit.transport.frames import Assembler, Flag, FrameKind, Message, frames_of, json_frame
from fedsplit.transport.messages import Hello, Welcome, code_of, error_frame, read_body
from fedsplit.transport.rules import Rules, agree
from fedsplit.transport.shapes import ACK, LOSSES, probed_dims, z_dims
from fedsplit.transport.tokens import SiteToken

log = logging.getLogger(__name__)

_AHEAD = 2


class Inbox:
    """Messages on their way from reader to worker: bounded, and timed by the last sign of life."""

    def __init__(self) -> None:
        self._items: deque[Message] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: EncoderError | None = None
        self._alive = time.monotonic()

    def touch(self) -> None:
        """Something came or went."""
        self._alive = time.monotonic()

    def put(self, message: Message) -> bool:
        """Wait for room. False when nobody will take it."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < _AHEAD or self._ended)
            if self._ended:
                return False
            self._items.append(message)
            self._changed.notify_all()
            return True

    def end(self, error: EncoderError | None = None) -> None:
        """No more will come; `get` gives what is there, then raises `error` or returns None. The first end counts."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def drop(self, error: EncoderError) -> None:
        """Like `end`, also for what waits here, whoever ended it before."""
        with self._changed:
            self._items.clear()
            self._ended, self._error = True, error
            self._changed.notify_all()

    def pause(self, wait_s: float) -> None:
        """Wait, unless the stream ends with an error meanwhile, which is raised."""
        if not wait_s:
            return
        with self._changed:
            if self._changed.wait_for(lambda: self._error is not None, wait_s):
                assert self._error is not None, "it was there a moment ago, and stays"
                raise self._error

    def get(self, idle_s: float) -> Message | None:
        """The next message; None at the end of the stream. Raises UnreachableError after `idle_s` of silence."""
        with self._changed:
            while not self._items:
                if self._ended and self._error is not None:
                    raise self._error
                if self._ended:
                    return None
                left_s = self._alive + idle_s - time.monotonic()
                if left_s <= 0:
                    raise UnreachableError(
                        f"nothing came for {idle_s:g} s, which is as long as a session may idle"
                    )
                self._changed.wait(left_s)
            message = self._items.popleft()
            self._changed.notify_all()
            return message


class Session:
    """From HELLO to the stream's end. `run` once, from one thread; `stop` and `drop` from any."""

    def __init__(
        self, host: EncoderHost, token: SiteToken, admission: Admission, requests: Iterable[bytes]
    ) -> None:
        self.id = secrets.randbits(63) + 1
        self.sending_since: float | None = None
        """When the chunk that gRPC has not taken yet was handed to it; None while there is none."""
        self.dropped = False
        self._host = host
        self._token = token
        self._admission = admission
        self._requests = requests
        self._limits = admission.limits
        self._rules = Rules(admission.limits)
        self._inbox = Inbox()
        self._encoder: HostedEncoder | None = None

    def __str__(self) -> str:
        grant = self._token.grant
        who = f"run {printable(grant.run)}, site {printable(grant.site)}, round {grant.round}"
        return f"session {self.id:x} ({who})"

    def run(self) -> Iterator[bytes]:
        """The frames to send, until the session is over. An error becomes an ERROR frame."""
        threading.Thread(target=self._read, name=f"fedsplit-read-{self.id:x}", daemon=True).start()
        try:
            yield from self._send(self._guarded())
        finally:  # also when gRPC drops this generator because the peer is gone
            self._inbox.end()
            self._close_encoder()

    def stop(self, error: EncoderError) -> None:
        """End the session after what it has received."""
        self._inbox.end(error)

    def drop(self, error: EncoderError) -> None:
        """End the session now: what it has received and not begun is dropped."""
        self.dropped = True
        self._inbox.drop(error)

    def _guarded(self) -> Iterator[bytes]:
        try:
            yield from self._serve()
        except EncoderError as error:
            # A peer's words forge no lines.
            log.warning("%s ends: %s: %s", self, type(error).__name__, printable(error))
            self._admission.refuse(code_of(error))
            yield error_frame(error, session=self.id)
        except Exception:  # the outermost handler of the stream
            log.exception("%s ends: the host failed", self)
            self._admission.refuse("internal")
            short = EncoderError(f"the encoder failed; its log says why, under session {self.id:x}")
            yield error_frame(short, session=self.id)

    def _send(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            self.sending_since = time.monotonic()
            yield frame
            self.sending_since = None
            self._inbox.touch()

    def _read(self) -> None:
        assembler = Assembler(self._rules.admit)
        try:
            for frame in self._requests:
                self._inbox.touch()
                message = assembler.feed(frame)
                if message is not None and not self._inbox.put(message):
                    return
            assembler.finish()
        except EncoderError as error:
            self._inbox.end(error)
        except grpc.RpcError:  # the call is over, whoever ended it
            self._inbox.end()
        else:
            self._inbox.end()

    def _serve(self) -> Iterator[bytes]:
        first = self._inbox.get(self._limits.hello_timeout_s)
        if first is None:
            return
        hello = read_body(Hello, first)
        grant = self._token.grant
        welcome = agree(hello, grant, self._host.capabilities(), self._limits, self.id)
        encoder = self._encoder = self._host.open(grant)
        codec = find_codec(hello.codec)
        self._rules.welcome(welcome, codec)
        log.info(
            "%s opens: cut %s, codec %s, version %s", self, grant.cut, codec.name, grant.version
        )
        yield json_frame(FrameKind.WELCOME, welcome.model_dump_json(), session=self.id)
        mask: Mask | None = None
        while (message := self._inbox.get(self._limits.idle_timeout_s)) is not None:
            kind = message.header.kind
            if kind is FrameKind.MASK:
                mask = decode_mask(message.header.dims, message.payload)
            elif kind is FrameKind.ENCODE:
                yield from self._encode(encoder, codec, welcome, message, mask)
                mask = None
            elif kind is FrameKind.PROBE:
                yield from self._encode_probes(encoder, codec, welcome, message, mask)
                mask = None
            elif kind is FrameKind.SCORE:
                yield from self._settle_losses(encoder, message)
            else:
                yield from self._settle(encoder, codec, message)

    def _encode(
        self,
        encoder: HostedEncoder,
        codec: Codec,
        welcome: Welcome,
        message: Message,
        mask: Mask | None,
    ) -> Iterator[bytes]:
        header = message.header
        step, keep = header.step, bool(header.flags & Flag.KEEP)
        out_dims = z_dims(header.dims, welcome)
        h_BTD = _tensor_of(codec, message)
        self._inbox.pause(self._admission.take_step(self._token, header.dims[0]))
        if keep:
            self._rules.check_keep(step)
            size = encoder.graph_bytes(*header.dims[:2])
            self._admission.keep(size, held=bool(self._rules.kept))
            self._rules.keep(step, header.dims, out_dims, size)
            self._admission.count("kept")
        z = encoder.encode(step, h_BTD, mask, want="gradient" if keep else "output")
        self._admission.count("encoded")
        yield from self._reply(FrameKind.ENCODED, codec, step, z, out_dims)

    def _settle(self, encoder: Encoder, codec: Codec, message: Message) -> Iterator[bytes]:
        step = message.header.step
        dz = _tensor_of(codec, message)
        kept = self._rules.release(step)
        self._admission.count("kept", -1)
        try:
            dh = encoder.settle(step, dz, quiet=bool(message.header.flags & Flag.QUIET))
            if dh is None:
                answer = self._ack(step)
            else:
                answer = self._reply(FrameKind.GRAD, codec, step, dh, kept.h_dims)
            self._admission.count("backpropped")
            yield from answer
        finally:
            self._admission.release(kept.graph_bytes)

    def _encode_probes(
        self, encoder: Encoder, codec: Codec, welcome: Welcome, message: Message, mask: Mask | None
    ) -> Iterator[bytes]:
        step, h_dims = message.header.step, message.header.dims
        h_BTD = _tensor_of(codec, message)
        self._admission.take_step(self._token, h_dims[0])
        self._rules.await_losses(step)
        z = encoder.encode(step, h_BTD, mask, want="probes")
        self._admission.count("probed")
        yield from self._reply(FrameKind.PROBED, codec, step, z, probed_dims(h_dims, welcome))

    def _settle_losses(self, encoder: Encoder, message: Message) -> Iterator[bytes]:
        step = message.header.step
        losses_K = _tensor_of(LOSSES, message)
        self._rules.scored(step)
        encoder.settle(step, losses_K)
        self._admission.count("scored")
        yield from self._ack(step)

    def _ack(self, step: int) -> Iterator[bytes]:
        return frames_of(FrameKind.ACK, ACK, session=self.id, step=step)

    def _reply(
        self, kind: FrameKind, codec: Codec, step: int, array: Array, dims: Dims
    ) -> Iterator[bytes]:
        check_range(array, f"the answer to {kind.name} step {step}")
        if array.shape != dims:  # the host's fault, not the site's
            raise RuntimeError(
                f"the host answered {kind.name} step {step} with shape {array.shape}, not {dims}"
            )
        return frames_of(kind, codec.encode(array), codec=codec.id, session=self.id, step=step)

    def _close_encoder(self) -> None:
        self._admission.count("kept", -len(self._rules.kept))
        self._admission.release(sum(kept.graph_bytes for kept in self._rules.kept.values()))
        self._rules.kept.clear()
        if self._encoder is not None:
            try:
                self._encoder.close()
            except Exception:  # nobody is left to tell, and the place must be freed
                log.exception("%s: closing the host's encoder failed", self)


def _tensor_of(codec: Codec, message: Message) -> Array:
    array = codec.decode(message.header.dims, message.payload)
    check_range(array, f"{message.header.kind.name} step {message.header.step}")
    return array
