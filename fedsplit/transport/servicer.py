"""The methods of the encoder's service: token, certificate, then a session or a small call. Driven by server.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import grpc

from fedsplit.core.encoder import EncoderHost
from fedsplit.core.errors import EncoderError, OverloadedError, RefusedError
from fedsplit.core.names import certificate_name
from fedsplit.transport import encoder_pb2 as pb
from fedsplit.transport.admission import Admission
from fedsplit.transport.deltas import chunks_of
from fedsplit.transport.session import Session
from fedsplit.transport.tokens import SiteToken, verify_any, verify_publisher, verify_site
from fedsplit.transport.wiring import CAPABILITIES, COLLECT, PUBLISH, RETRY_AFTER_KEY, STEPS

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Servicer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """The methods of the service, and the sessions that are live in them."""

    def __init__(
        self, host: EncoderHost, key: bytes, admission: Admission, *, check_names: bool
    ) -> None:
        self._host = host
        self._key = key
        self._admission = admission
        self._check_names = check_names
        self._live: dict[int, tuple[Session, Any]] = {}
        self._handlers = {
            STEPS: grpc.stream_stream_rpc_method_handler(self._steps),  # no serialisers: raw bytes
            CAPABILITIES: grpc.unary_unary_rpc_method_handler(
                self._capabilities,
                request_deserializer=pb.CapabilitiesRequest.FromString,
                response_serializer=pb.CapabilitiesReply.SerializeToString,
            ),
            PUBLISH: grpc.stream_unary_rpc_method_handler(
                self._publish,
                request_deserializer=pb.PublishChunk.FromString,
                response_serializer=pb.PublishReply.SerializeToString,
            ),
            COLLECT: grpc.unary_stream_rpc_method_handler(
                self._collect,
                request_deserializer=pb.CollectRequest.FromString,
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
        try:
            with self._admission.admit(token), self._tracked(token, requests, context) as session:
                yield from session.run()
        except OverloadedError as error:
            self._admission.refuse("overloaded")
            context.set_trailing_metadata(((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

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

    def _capabilities(self, _request: pb.CapabilitiesRequest, context: Any) -> pb.CapabilitiesReply:
        self._authorised(context, verify_any)
        return pb.CapabilitiesReply(**self._host.capabilities().model_dump())

    def _publish(self, chunks: Iterator[pb.PublishChunk], context: Any) -> pb.PublishReply:
        run = self._authorised(context, verify_publisher)
        version, tensors = self._receive_version(chunks, context)
        with _answered(context, f"run {run} cannot publish version {version!r}"):
            self._host.publish(version, tensors)
        self._admission.count("published")
        log.info("run %s published version %s, %d bytes", run, version, len(tensors))
        return pb.PublishReply()

    def _collect(self, request: pb.CollectRequest, context: Any) -> Iterator[pb.CollectChunk]:
        run = self._authorised(context, verify_publisher)
        version = request.version
        if not 1 <= len(version) <= 128:
            _abort(context, _INVALID, "the request must name a version of 1 to 128 characters")
        with _answered(context, f"run {run} cannot collect version {version!r}"):
            deltas = self._host.collect(version)
        log.info("run %s collected what %d sites trained on %s", run, len(deltas), version)
        yield from chunks_of(deltas)

    def _receive_version(
        self, chunks: Iterator[pb.PublishChunk], context: Any
    ) -> tuple[str, bytes]:
        first = next(chunks, None)
        limit = self._admission.limits.max_publish_bytes
        if first is None or not 1 <= len(first.version) <= 128:
            _abort(context, _INVALID, "the first chunk must name a version of 1 to 128 characters")
        if first.total_bytes > limit:
            text = f"a version of {first.total_bytes} bytes: at most {limit} are allowed"
            _abort(context, _INVALID, text)
        data = bytearray(first.data)
        for chunk in chunks:
            data += chunk.data
            if len(data) > first.total_bytes:
                break
        if len(data) != first.total_bytes:
            text = f"the chunks do not make the {first.total_bytes} bytes that the first one names"
            _abort(context, _INVALID, text)
        return first.version, bytes(data)

    def _authorised(self, context: Any, check: Callable[..., _T]) -> _T:
        """What `check` makes of the call's token, or the call ends."""
        header = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = str(header).partition(" ")
        try:
            if scheme != "Bearer" or not token:
                raise RefusedError("the call brings no token: the ServerApp sends each site one")
            return check(token, self._key, leeway_s=self._admission.limits.clock_leeway_s)
        except RefusedError as error:
            log.warning("a call from %s is refused: %s", context.peer(), error)
            self._admission.refuse("token")
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, str(error))

    def _check_certificate(self, token: SiteToken, context: Any) -> None:
        if not self._check_names:
            return
        names = {name.decode(errors="replace") for name in context.peer_identities() or ()}
        if not names & {token.grant.site, certificate_name(token.grant.site)}:
            self._admission.refuse("certificate")
            text = (
                f"the token is for site {token.grant.site!r}, the certificate for {sorted(names)}"
            )
            log.warning("a call from %s is refused: %s", context.peer(), text)
            _abort(context, grpc.StatusCode.PERMISSION_DENIED, text)


@contextmanager
def _answered(context: Any, what: str) -> Iterator[None]:
    """End the call with a status when the host raises: typed errors in full, others short."""
    try:
        yield
    except EncoderError as error:
        log.warning("%s: %s", what, error)
        code = grpc.StatusCode.PERMISSION_DENIED if isinstance(error, RefusedError) else _INVALID
        context.abort(code, str(error)[:1000])
    except Exception:  # the outermost handler of the call
        log.exception("%s: the host failed", what)
        context.abort(grpc.StatusCode.INTERNAL, "the encoder failed; its log says why")


def _abort(context: Any, code: Any, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort raises")
