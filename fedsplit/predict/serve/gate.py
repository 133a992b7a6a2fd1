"""Who may ask: the token, and on loopback the name that was asked for. One line of JSON for each call, without its input.

An ASGI layer around all of app.py, so that nothing gets by it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedsplit.core.foreign import printable
from fedsplit.predict.serve.counts import Counts

PREDICT = "/v1/predict"
HEALTH = "/health"
_MODULE_CHARS = 12
Access = Callable[[dict[str, Any]], None]
"""Keeps one call: `time`, `client`, `method`, `path`, `status`, `ms`, `bytes` (of the body, as read), `samples`, `module`."""


class Gate:
    """Lets calls through to `app`, and tells of each."""

    def __init__(
        self, app: ASGIApp, *, counts: Counts, access: Access, token: bytes = b"", loopback: bool
    ) -> None:
        """Without a `token` everybody may ask who can reach it; `loopback`: that is this machine alone."""
        self._app, self._counts, self._access = app, counts, access
        self._wanted = hashlib.sha256(token).digest() if token else b""
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        # What app.py adds to the line.
        told: dict[str, Any] = scope.setdefault("state", {}).setdefault("told", {})
        status = 500
        read = 0

        async def received() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            app: ASGIApp = self._refusal(scope) or self._app
            await app(scope, received, sent)
        finally:
            took = time.monotonic() - began
            if scope["path"] == PREDICT:
                self._counts.add(status, took, told.get("samples", 0))
            self._access(_line(scope, status, took, read, told))

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._loopback and not self._wanted and not _is_here(headers.get("host", "")):
            # A web page may give its own name this address, and then read what is answered.
            return refusal(
                403,
                "host",
                f"asked for as {printable(headers.get('host', ''), limit=80)!r}; use localhost or 127.0.0.1, or start the "
                f"service with a token",
            )
        if not self._wanted or scope["path"] == HEALTH:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        if hmac.compare_digest(digest, self._wanted) and kind.lower() == "bearer":
            return None
        told = refusal(
            401,
            "token",
            "the token is missing or wrong; send the header Authorization: Bearer TOKEN, with the content of the "
            "service's token file",
        )
        told.headers["WWW-Authenticate"] = "Bearer"
        return told


def refusal(status: int, kind: str, message: str) -> JSONResponse:
    """An answer that says no, as all of fedsplit's services say it."""
    return JSONResponse(
        {"error": {"kind": kind, "message": printable(message, limit=2000)}}, status
    )


def _is_here(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.removeprefix("[").removesuffix("]").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _line(
    scope: Scope, status: int, took_s: float, read: int, told: dict[str, Any]
) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "client": scope["client"][0] if scope.get("client") else "",
        "method": printable(scope["method"], limit=16),
        "path": printable(scope["path"], limit=100),
        "status": status,
        "ms": round(1000 * took_s, 2),
        "bytes": read,
        **({"samples": told["samples"]} if "samples" in told else {}),
        **({"module": told["module"][:_MODULE_CHARS]} if "module" in told else {}),
    }
