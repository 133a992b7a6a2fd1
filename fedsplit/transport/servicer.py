"""The methods of the encoder's service: token, caller, then a session or a small call. Driven by server.py.

The token stands in the call's headers and is checked before anything of the body is read (requests.py); who shows it:
callers.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from fedsplit.core.encoder import EncoderHost
from fedsplit.core.errors import EncoderError, OverloadedError, ProtocolError, RefusedError
from fedsplit.core.foreign import printable
from fedsplit.core.throttle import Throttle
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.admission import Admission
from fedsplit.transport.callers import REVOKED, Caller, Callers
from fedsplit.transport.deltas import chunks_of
from fedsplit.transport.requests import MAX_CHUNK_BYTES, MAX_SMALL_BYTES, SmallCalls
from fedsplit.transport.session import Session
from fedsplit.transport.tokens import SiteToken, verify_any, verify_publisher, verify_site
from fedsplit.transport.wiring import CAPABILITIES, COLLECT, PUBLISH, RETRY_AFTER_KEY, STEPS

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Live(NamedTuple):
    """A session, its gRPC context, and whose it is."""

    session: Session
    context: Any
    caller: Caller


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """The methods of the service, and the sessions that are live in them."""

    def __init__(
        self,
        host: EncoderHost,
        key: bytes,
        admission: Admission,
        *,
        callers: Callers,
        small_calls: int,
    ) -> None:
        """`small_calls` may be on at once."""
        self._host = host
        self._key = key
        self._admission = admission
        self._callers = callers
        self._live: dict[int, Live] = {}
        self.small = SmallCalls(small_calls, admission.limits.retry_after_s)
        self._throttle = Throttle()
        self._handlers = {
            # Stream handlers of raw bytes, all of them: they start on the headers.
            STEPS: grpc.stream_stream_rpc_method_handler(self._steps),
            CAPABILITIES: grpc.stream_unary_rpc_method_handler(
                self._capabilities,
                response_serializer=pb.CapabilitiesReply.SerializeToString,
            ),
            PUBLISH: grpc.stream_unary_rpc_method_handler(
                self._publish,
                response_serializer=pb.PublishReply.SerializeToString,
            ),
            COLLECT: grpc.stream_stream_rpc_method_handler(
                self._collect,
                response_serializer=pb.CollectChunk.SerializeToString,
            ),
        }

    def service(self, handler_call_details: Any) -> Any:
        """gRPC asks for the method's handler; None is UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)

    def live(self) -> list[Live]:
        """Sessions that are on."""
        return list(self._live.values())

    def end_revoked(self) -> None:
        """End the sessions of sites that are no longer let in. Called twice a second."""
        for live in self.live():
            if not self._callers.is_revoked(live.caller):
                continue
            if (
                live.session.dropped
            ):  # it was told at the last look, and does not read or still computes
                live.context.cancel()
            else:
                live.session.drop(RefusedError(REVOKED))

    def _steps(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        token, caller = self._authorised(context, verify_site)
        with (
            self._full(context),
            self._admission.admit(token),
            self._tracked(
                Session(self._host, token, self._admission, requests), context, caller
            ) as session,
        ):
            yield from session.run()

    @contextmanager
    def _full(self, context: Any) -> Iterator[None]:
        """End the call with a time to come back where there is no room for it."""
        try:
            yield
        except OverloadedError as error:
            self._admission.refuse("overloaded")
            context.set_trailing_metadata(((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    @contextmanager
    def _small(self, context: Any, check: Callable[..., _T], what: str) -> Iterator[_T]:
        """A small call: its token, a place for it, and a status for what goes wrong in it."""
        who, _ = self._authorised(context, check)
        # A site cannot keep the ServerApp from publishing, whatever it holds open.
        half = check is verify_any
        run = who.grant.run if isinstance(who, SiteToken) else who
        what = f"run {printable(run)}: {what}"
        with self._full(context), self.small.place(half=half), _answered(context, what):
            yield who

    @contextmanager
    def _tracked(self, session: Session, context: Any, caller: Caller) -> Iterator[Session]:
        self._live[session.id] = Live(session, context, caller)
        try:
            yield session
        finally:
            del self._live[session.id]

    def _capabilities(self, requests: Iterator[bytes], context: Any) -> pb.CapabilitiesReply:
        with self._small(context, verify_any, "capabilities"):
            self._only(pb.CapabilitiesRequest, requests, context)
            return pb.CapabilitiesReply(**self._host.capabilities().model_dump())

    def _publish(self, requests: Iterator[bytes], context: Any) -> pb.PublishReply:
        with self._small(context, verify_publisher, "a version cannot be published") as run:
            version, tensors = self._receive_version(requests, context)
            self._host.publish(version, tensors)
            self._admission.count("published")
            log.info("run %s published version %s, %d bytes", run, version, len(tensors))
            return pb.PublishReply()

    def _collect(self, requests: Iterator[bytes], context: Any) -> Iterator[pb.CollectChunk]:
        with self._small(context, verify_publisher, "a version cannot be collected") as run:
            version = _version(self._only(pb.CollectRequest, requests, context).version)
            deltas = self._host.collect(version)
            log.info("run %s collected what %d sites trained on %s", run, len(deltas), version)
            yield from chunks_of(deltas)

    def _only(self, kind: type[_M], requests: Iterator[bytes], context: Any) -> _M:
        """The one message of a unary request. Raises ProtocolError where there is none."""
        for message in self.small.read(kind, requests, context, max_bytes=MAX_SMALL_BYTES):
            return message
        raise ProtocolError(f"the call ended without its {kind.__name__}")

    def _receive_version(self, requests: Iterator[bytes], context: Any) -> tuple[str, bytes]:
        chunks = self.small.read(pb.PublishChunk, requests, context, max_bytes=MAX_CHUNK_BYTES)
        limit = self._admission.limits.max_publish_bytes
        first = next(chunks, None)
        version = _version(first.version if first else "")
        assert first is not None
        if first.total_bytes > limit:
            raise ProtocolError(
                f"a version of {first.total_bytes} bytes: at most {limit} are allowed"
            )
        data = bytearray(first.data)
        for chunk in chunks:
            data += chunk.data
            if len(data) > first.total_bytes:
                break
        if len(data) != first.total_bytes:
            raise ProtocolError(
                f"the chunks do not make the {first.total_bytes} bytes that the first one names"
            )
        return version, bytes(data)

    def _authorised(self, context: Any, check: Callable[..., _T]) -> tuple[_T, Caller]:
        """What `check` makes of the call's token, and whose call it is; or the call ends."""
        header = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = str(header).partition(" ")
        try:
            if scheme != "Bearer" or not token:
                raise RefusedError("the call brings no token: the ServerApp sends each site one")
            who = check(token, self._key, leeway_s=self._admission.limits.clock_leeway_s)
        except RefusedError as error:
            self._refuse("token", context, error)
        try:
            caller = (
                self._callers.site(context, who)
                if isinstance(who, SiteToken)
                else self._callers.publisher(context)
            )
        except RefusedError as error:
            self._refuse("certificate", context, error)
        if self._callers.is_revoked(caller):
            self._refuse("revoked", context, RefusedError(REVOKED))
        return who, caller

    def _refuse(self, reason: str, context: Any, error: RefusedError) -> NoReturn:
        """End the call: without a good token nobody is anybody, with one it may be the wrong one's."""
        self._say_refused(reason, context, str(error))
        self._admission.refuse(reason)
        status = grpc.StatusCode
        code = status.UNAUTHENTICATED if reason == "token" else status.PERMISSION_DENIED
        context.abort(code, str(error))
        raise AssertionError("abort raises")

    def _say_refused(self, kind: str, context: Any, text: str) -> None:
        """To the log, a few times a minute: who is not let in may come back as often as it likes."""
        left_out = self._throttle.left_out(kind)
        if left_out is not None:
            more = f" ({left_out} more were refused and are not in this log)" if left_out else ""
            log.warning(
                "a call from %s is refused: %s%s", printable(context.peer()), printable(text), more
            )


@contextmanager
def _answered(context: Any, what: str) -> Iterator[None]:
    """End the call with a status when the host raises: typed errors in full, others short."""
    try:
        yield
    except OverloadedError:
        raise
    except EncoderError as error:
        log.warning("%s: %s", what, printable(error))
        code = grpc.StatusCode.PERMISSION_DENIED if isinstance(error, RefusedError) else _INVALID
        context.abort(code, str(error)[:1000])
    except grpc.RpcError:  # the call is over, whoever ended it
        raise
    except Exception:  # the outermost handler of the call
        log.exception("%s: the host failed", what)
        context.abort(grpc.StatusCode.INTERNAL, "the encoder failed; its log says why")


def _version(name: str) -> str:
    if not 1 <= len(name) <= 128:
        raise ProtocolError("the request must name a version of 1 to 128 characters")
    return name
