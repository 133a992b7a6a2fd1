"""The methods of the encoder's service: token, certificate, then a session or a small call. Driven by server.py.

The token stands in the call's headers and is checked before anything of the body is read (requests.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from fedsplit.core.encoder import EncoderHost
from fedsplit.core.errors import EncoderError, OverloadedError, ProtocolError, RefusedError
from fedsplit.core.foreign import printable
from fedsplit.core.names import certificate_name
from fedsplit.core.throttle import Throttle
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.admission import Admission
from fedsplit.transport.deltas import chunks_of
from fedsplit.transport.requests import MAX_CHUNK_BYTES, MAX_SMALL_BYTES, SmallCalls
from fedsplit.transport.session import Session
from fedsplit.transport.tokens import SiteToken, verify_any, verify_publisher, verify_site
from fedsplit.transport.wiring import CAPABILITIES, COLLECT, PUBLISH, RETRY_AFTER_KEY, STEPS

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """The methods of the service, and the sessions that are live in them."""

    def __init__(
        self,
        host: EncoderHost,
        key: bytes,
        admission: Admission,
        *,
        check_names: bool,
        small_calls: int,
    ) -> None:
        """`small_calls` may be on at once."""
        self._host = host
        self._key = key
        self._admission = admission
        self._check_names = check_names
        self._live: dict[int, tuple[Session, Any]] = {}
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

    def live(self) -> list[tuple[Session, Any]]:
        """Sessions and their gRPC contexts."""
        return list(self._live.values())

    def _steps(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        token = self._authorised(context, verify_site)
        self._check_certificate(token, context)
        with (
            self._full(context),
            self._admission.admit(token),
            self._tracked(token, requests, context) as session,
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
        who = self._authorised(context, check)
        # A site cannot keep the ServerApp from publishing, whatever it holds open.
        half = check is verify_any
        what = f"run {printable(who)}: {what}" if who else what
        with self._full(context), self.small.place(half=half), _answered(context, what):
            yield who

    @contextmanager
    def _tracked(
        self, token: SiteToken, requests: Iterator[bytes], context: Any
    ) -> Iterator[Session]:
        session = Session(self._host, token, self._admission, requests)
        self._live[session.id] = session, context
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

    def _authorised(self, context: Any, check: Callable[..., _T]) -> _T:
        """What `check` makes of the call's token, or the call ends."""
        header = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = str(header).partition(" ")
        try:
            if scheme != "Bearer" or not token:
                raise RefusedError("the call brings no token: the ServerApp sends each site one")
            return check(token, self._key, leeway_s=self._admission.limits.clock_leeway_s)
        except RefusedError as error:
            self._say_refused("token", context, str(error))
            self._admission.refuse("token")
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, str(error))

    def _check_certificate(self, token: SiteToken, context: Any) -> None:
        if not self._check_names:
            return
        identities = context.peer_identities() or ()
        names = {printable(name.decode(errors="replace"), limit=128) for name in identities}
        if not names & {token.grant.site, certificate_name(token.grant.site)}:
            self._admission.refuse("certificate")
            text = (
                f"the token is for site {token.grant.site!r}, the certificate for {sorted(names)}"
            )
            self._say_refused("certificate", context, text)
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, text)

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


def _abort(context: Any, code: Any, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")
