"""The client's half of one Steps call: frames out, replies in, each reply to whoever waits for it.

gRPC's thread takes frames from `Outbox`; a reader thread puts replies together and wakes the waiting caller. Knows nothing
of encode or backprop (client.py does); gRPC's errors are translated in status.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc

from fedsplit.core.errors import EncoderError, OverloadedError, ProtocolError, UnreachableError
from fedsplit.transport.codec import Codec, Dims
from fedsplit.transport.frames import Assembler, FrameKind, Header, Message, check_json, json_frame
from fedsplit.transport.messages import ErrorBody, Hello, Welcome, error_of, read_body
from fedsplit.transport.shapes import check_ack, check_payload
from fedsplit.transport.status import translate
from fedsplit.transport.wiring import STEPS

_CLOSE_S = 2.0


class Outbox(Iterator[bytes]):
    """What gRPC's sending thread iterates over. Frames are made when they leave, and counted."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.moved_at = time.monotonic()
        self._messages: SimpleQueue[Iterable[bytes] | None] = SimpleQueue()
        self._frames: Iterator[bytes] = iter(())

    def put(self, frames: Iterable[bytes]) -> None:
        """Queue a message's frames. Bounded by the client's slots, not here."""
        self._messages.put(frames)

    def close(self) -> None:
        """Half-close the call after what is queued."""
        self._messages.put(None)

    def __next__(self) -> bytes:
        while (frame := next(self._frames, None)) is None:
            frames = self._messages.get()
            if frames is None:
                raise StopIteration
            self._frames = iter(frames)
        self.sent_bytes += len(frame)
        self.moved_at = time.monotonic()
        return frame


class Reply:
    """An awaited answer: the shape it must have, and whether it is there."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self.done = threading.Event()
        self.message: Message | None = None


class Duplex:
    """One call. After an error it is over, and everyone who waits or comes later gets that error."""

    def __init__(self, channel: Any, address: str, token: str, codec: Codec, *, tls: bool) -> None:
        self.outbox = Outbox()
        self.received_bytes = 0
        self.welcome: Welcome | None = None
        self._address = address
        self._codec = codec
        self._tls = tls
        self._lock = threading.Lock()
        self._error: EncoderError | None = None
        self._replies: dict[tuple[FrameKind, int], Reply] = {}
        self._welcomed = threading.Event()
        self._moved_at = time.monotonic()
        self._call = channel.stream_stream(STEPS)(
            self.outbox, metadata=(("authorization", f"Bearer {token}"),)
        )
        self._reader = threading.Thread(
            target=self._read, name=f"fedsplit-read-{address}", daemon=True
        )
        self._reader.start()

    def greet(self, hello: Hello, timeout_s: float) -> Welcome:
        """Open the session. Raises whatever the encoder answers, UnreachableError if it does not."""
        self.outbox.put((json_frame(FrameKind.HELLO, hello.model_dump_json()),))
        if not self._welcomed.wait(timeout_s):
            self.fail(
                UnreachableError(
                    f"no encoder answered at {self._address} within {timeout_s:g} s; is `fedsplit encoder serve` running "
                    "there, and does a firewall let this port through?"
                )
            )
        self.check_alive()
        if self.welcome is None:
            raise ProtocolError(f"the encoder at {self._address} did not answer HELLO with WELCOME")
        return self.welcome

    def post(self, frames: Iterable[bytes], answer: FrameKind, step: int, dims: Dims) -> Reply:
        """Queue a message; `wait` for what comes back. Messages leave in the order of the calls."""
        reply = Reply(dims)
        with self._lock:
            if self._error is None:
                self._replies[answer, step] = reply
                self.outbox.put(frames)
        self.check_alive()
        return reply

    def wait(self, reply: Reply, what: str, timeout_s: float) -> Message:
        """The answer. Raises UnreachableError when nothing at all moves for `timeout_s`."""
        started = time.monotonic()
        while not reply.done.is_set():
            moved_at = max(started, self._moved_at, self.outbox.moved_at)
            if not reply.done.wait(
                max(0.0, moved_at + timeout_s - time.monotonic())
            ) and moved_at >= max(self._moved_at, self.outbox.moved_at):
                self.fail(
                    UnreachableError(
                        f"the encoder at {self._address} did not answer {what} within {timeout_s:g} s; is it overloaded, "
                        "or the step timeout too short for this batch?"
                    )
                )
        if reply.message is None:
            self.check_alive()
            raise AssertionError("a reply without a message comes with an error")
        return reply.message

    def check_alive(self) -> None:
        """Raise the error that ended the call, if one did. Each caller gets an exception of its own."""
        if (error := self._error) is None:
            return
        if isinstance(error, OverloadedError):
            raise OverloadedError(str(error), retry_after_s=error.retry_after_s) from error
        raise type(error)(str(error)) from error

    def fail(self, error: EncoderError) -> None:
        """End the call; the first error counts."""
        self._end(error)
        self._call.cancel()

    def close(self) -> None:
        """Half-close, let the encoder end the call, cut after two seconds. Twice is harmless."""
        self.outbox.close()
        self._reader.join(_CLOSE_S)
        self._call.cancel()
        self._reader.join()

    def _end(self, error: EncoderError) -> None:
        with self._lock:
            self._error = self._error or error
            replies = list(self._replies.values())
            self._replies.clear()
        self.outbox.close()
        self._welcomed.set()
        for reply in replies:
            reply.done.set()

    def _read(self) -> None:
        assembler = Assembler(self._admit)
        try:
            for frame in self._call:
                self.received_bytes += len(frame)
                self._moved_at = time.monotonic()
                message = assembler.feed(frame)
                if message is not None:
                    self._dispatch(message)
            assembler.finish()
            error: EncoderError = UnreachableError(
                f"the session with the encoder at {self._address} is closed"
            )
        except grpc.RpcError as rpc_error:
            error = translate(rpc_error, self._address, tls=self._tls)
            error.__cause__ = rpc_error
        except EncoderError as read_error:
            error = read_error
            self._call.cancel()
        self._end(error)

    def _admit(self, header: Header) -> None:
        if header.kind in (FrameKind.WELCOME, FrameKind.ERROR):
            check_json(header)
            return
        reply = self._replies.get((header.kind, header.step))
        if reply is None or self.welcome is None or header.session != self.welcome.session:
            raise ProtocolError(
                f"the encoder at {self._address} sent a {header.kind.name} that nobody waits for"
            )
        if header.dims != reply.dims:
            raise ProtocolError(
                f"the encoder at {self._address} sent {header.kind.name} of shape {header.dims}: {reply.dims} is wanted"
            )
        if header.kind is FrameKind.ACK:
            check_ack(header)
        else:
            check_payload(header, self._codec, self.welcome.max_message_bytes)

    def _dispatch(self, message: Message) -> None:
        kind = message.header.kind
        if kind is FrameKind.ERROR:
            raise error_of(read_body(ErrorBody, message), self._address)
        if kind is FrameKind.WELCOME:
            if self.welcome is not None:
                raise ProtocolError(f"the encoder at {self._address} sent a second WELCOME")
            self.welcome = read_body(Welcome, message)
            self._welcomed.set()
            return
        with self._lock:
            reply = self._replies.pop((kind, message.header.step), None)
        if reply is not None:
            reply.message = message
            reply.done.set()
