"""The encoder's port: `EncoderServer` puts an EncoderHost behind gRPC.

It binds, checks tokens, gives streams to session.py and answers the small calls. Who may call: callers.py; what a session may
do: rules.py; how many there may be: admission.py. The bytes: docs/protocol.md.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from fedsplit.core.address import host_of, is_loopback
from fedsplit.core.closing import Closing
from fedsplit.core.encoder import EncoderHost
from fedsplit.core.errors import ConfigError, UnreachableError
from fedsplit.core.foreign import printable
from fedsplit.transport.admission import Admission, Limits, Stats
from fedsplit.transport.callers import Callers
from fedsplit.transport.revocation import Revoked
from fedsplit.transport.servicer import Servicer
from fedsplit.transport.tokens import check_key
from fedsplit.transport.wiring import ServerTls, server_options

__all__ = ["EncoderServer", "Limits", "ServerTls", "Stats"]

log = logging.getLogger(__name__)

_SMALL_CALLS = 8
_QUEUED_CALLS = 1000
_WATCH_S = 0.5
_SPARE_CALLS = 4  # threads for refusing, which takes no time: the token stands in the headers


class EncoderServer(Closing):
    """Serves from construction until `close`. Raises ConfigError when it cannot: address, key, certificates."""

    def __init__(
        self,
        host: EncoderHost,
        *,
        bind: str = "127.0.0.1:0",
        key: bytes,
        tls: ServerTls | None = None,
        limits: Limits | None = None,
        allow_insecure: bool = False,
        proxy_secret: bytes = b"",
        revoked_file: Path | None = None,
    ) -> None:
        """`key` signs the tokens. Beyond loopback TLS is a must, unless `allow_insecure` says otherwise.

        With `proxy_secret` a reverse proxy stands in front and tells who a site is (core/proxied.py). Whom `revoked_file`
        names is not let in, and put out within a second (revocation.py).
        """
        check_key(key)
        if tls is None and not is_loopback(bind) and not allow_insecure:
            raise ConfigError(
                f"the encoder would listen on {bind} without TLS: give a certificate and key, bind to 127.0.0.1 behind "
                "a proxy, or allow insecure connections explicitly"
            )
        self._admission = Admission(limits or Limits())
        self._revoked = Revoked(revoked_file)
        callers = Callers(
            certificates=tls is not None and tls.client_ca is not None,
            proxy_secret=proxy_secret,
            revoked=self._revoked,
        )
        self._calls = Servicer(
            host, key, self._admission, callers=callers, small_calls=_SMALL_CALLS
        )
        threads = self._admission.limits.max_sessions + _SMALL_CALLS + _SPARE_CALLS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fedsplit-encoder")
        # Sessions and small calls hold a thread each and are refused beyond their number, so the spare threads are always
        # free to look at the next call: what waits there waits for milliseconds.
        self._server = grpc.server(
            self._pool, options=server_options(), maximum_concurrent_rpcs=threads + _QUEUED_CALLS
        )
        self._server.add_generic_rpc_handlers((self._calls,))
        self.address = _bind(self._server, bind, tls)
        self._closing = threading.Event()
        self._server.start()
        self._watch = threading.Thread(target=self._watch_calls, name="fedsplit-watch", daemon=True)
        self._watch.start()
        log.info("the encoder listens on %s, %s", self.address, "TLS" if tls else "without TLS")

    def stats(self) -> Stats:
        """What is live, and counters since the start."""
        return self._admission.stats()

    def close(self, grace_s: float = 5.0) -> None:
        """Take no new calls, let sessions finish what they received, then cut. Twice is harmless."""
        if self._closing.is_set():
            return
        self._closing.set()
        stopped = self._server.stop(grace_s)
        for live in self._calls.live():
            live.session.stop(UnreachableError("it is shutting down"))
        stopped.wait(grace_s + 1.0)
        deadline = time.monotonic() + max(1.0, grace_s)
        while self.stats().live_sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        left = self.stats().live_sessions
        if left:
            log.error("%d sessions are still inside the host after %g s", left, grace_s)
        self._pool.shutdown(wait=not left)
        self._watch.join()

    def _watch_calls(self) -> None:
        """Twice a second: end who was revoked, and whose thread is stuck."""
        limits = self._admission.limits
        every_s = min(_WATCH_S, limits.idle_timeout_s / 4, limits.hello_timeout_s / 4)
        while not self._closing.wait(every_s):
            self._revoked.look()
            self._calls.end_revoked()
            self._end_stuck(limits)

    def _end_stuck(self, limits: Limits) -> None:
        """Cancel streams whose peer reads nothing, and small calls whose peer says nothing."""
        for session, context, _ in self._calls.live():
            since = session.sending_since
            if since is not None and time.monotonic() - since > limits.idle_timeout_s:
                log.warning("%s does not read what it is sent; its stream is cancelled", session)
                self._admission.refuse("unavailable")
                context.cancel()
        for context in self._calls.small.silent(limits.hello_timeout_s):
            log.warning("a call from %s says nothing; it is cancelled", printable(context.peer()))
            self._admission.refuse("unavailable")
            context.cancel()


def _bind(server: Any, bind: str, tls: ServerTls | None) -> str:
    """Bind, and return the address with the port that it got. Raises ConfigError."""
    host = host_of(bind)
    try:
        port = (
            server.add_secure_port(bind, tls.credentials())
            if tls
            else server.add_insecure_port(bind)
        )
    except RuntimeError as error:
        raise ConfigError(_why_not_bound(bind, tls)) from error
    if not port:
        raise ConfigError(_why_not_bound(bind, tls))
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why_not_bound(bind: str, tls: ServerTls | None) -> str:
    also = ", or whether certificate and key belong together" if tls else ""
    return (
        f"the encoder cannot listen on {bind}: the port is in use or the address is not this machine's. Stop what "
        f"listens there (`ss -ltnp`), or choose another port, e.g. 127.0.0.1:0 for any free one{also}"
    )
