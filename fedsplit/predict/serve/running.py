"""A service that runs, in a thread of its own: in a command, or beside training at a site."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ServiceError
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.app import create_app
from fedsplit.predict.serve.counts import Counts
from fedsplit.predict.serve.gate import Access, Gate
from fedsplit.predict.serve.listening import Listening

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""How long what was taken may still take at the end."""
_START_S = 20.0
_CONNECTIONS = 1000


class Serving(Closing):
    """A service that runs: `address` says where. Owns its socket, its thread, and what answers."""

    def __init__(
        self,
        answering: Answering,
        at: Listening,
        *,
        access: Access,
        fault: Callable[[], str] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        """Listen. Raises ConfigError, ServiceError. `access` keeps a line a call; `fault`: see create_app."""
        token = at.checked()
        self.answering, self.counts = answering, Counts()
        app = create_app(answering, self.counts, fault=fault)
        gate = Gate(app, counts=self.counts, access=access, token=token, loopback=at.loopback)
        config = uvicorn.Config(
            gate,
            # It bounds a request's head; the faster one does not.
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=max(1, int(grace_s)),
            ssl_certfile=at.tls_cert,
            ssl_keyfile=at.tls_key,
        )
        self._grace_s = grace_s
        socket_ = at.bound()
        self.address = at.address(socket_.getsockname()[1])
        self._server = uvicorn.Server(config)
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=[socket_], name="serve", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self.up or time.monotonic() > end:
                self.close()
                raise ServiceError(
                    f"the service at {self.address} did not start ({self._failed or 'no answer'}); its log says why"
                )
            time.sleep(0.01)

    @property
    def up(self) -> bool:
        """Does it still listen?"""
        return self._thread.is_alive()

    def close(self) -> None:
        """Take nothing more, answer what was taken, end."""
        self._server.should_exit = True
        self._thread.join(self._grace_s + 5)
        self.answering.close()

    def _run(self, socket_: socket.socket) -> None:
        try:
            self._server.run([socket_])
        except BaseException as err:
            self._failed.append(err)
            log.exception("the service ended")
        finally:
            socket_.close()
