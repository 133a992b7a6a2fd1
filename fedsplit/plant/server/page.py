"""The status page: one HTML file, server-sent events that feed it, the same as JSON, and metrics for Prometheus.

Paths are relative, so that the page works on loopback and behind a proxy's prefix. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from threading import Lock

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from fedsplit.core.errors import FedsplitError
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.metrics import exposition
from fedsplit.plant.server.status import FederationStatus, federation_status

EVERY_S = 1.0
MAX_VIEWERS = 32
_PAGE = files("fedsplit.plant.server") / "page.html"
# The page's own script and style, and nothing else.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


# What the page does not show, and what would be most of each event.
_NOT_SHOWN = {"sites": {"__all__": {"usage"}}}


class Watcher:
    """Reads the federation's state at most once in `every_s`, however many look."""

    def __init__(self, folder: FederationFolder, *, every_s: float = EVERY_S) -> None:
        self._folder, self._every_s = folder, every_s
        self._lock = Lock()
        self._read_at = 0.0
        self._found: FederationStatus | None = None
        self.viewers = 0

    def now(self) -> FederationStatus:
        """The state, at most `every_s` old. Raises FedsplitError."""
        with self._lock:
            if self._found is None or time.monotonic() - self._read_at >= self._every_s:
                self._found = federation_status(self._folder)
                self._read_at = time.monotonic()
            return self._found

    async def events(self) -> AsyncIterator[str]:
        """One event each `every_s` until the viewer goes."""
        self.viewers += 1
        try:
            while True:
                try:
                    found = await asyncio.to_thread(self.now)
                    yield f"data: {found.model_dump_json(exclude=_NOT_SHOWN)}\n\n"
                except FedsplitError:
                    # The page says that nothing new comes; the log of the service has the reason.
                    yield ": the state cannot be read now\n\n"
                await asyncio.sleep(self._every_s)
        finally:
            self.viewers -= 1


def page_router(folder: FederationFolder) -> APIRouter:
    """The page's paths; for loopback, or behind a proxy that asks for a login."""
    router = APIRouter()
    watcher = Watcher(folder)

    @router.get("/", response_class=HTMLResponse)
    def page() -> HTMLResponse:
        return HTMLResponse(
            _PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _POLICY}
        )

    @router.get("/events")
    async def events() -> StreamingResponse:
        if watcher.viewers >= MAX_VIEWERS:
            raise HTTPException(503, f"{MAX_VIEWERS} pages are open; close one")
        return StreamingResponse(
            watcher.events(),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    @router.get("/status.json")
    def status() -> FederationStatus:
        return watcher.now()

    @router.get("/metrics")
    def metrics() -> Response:
        text, kind = exposition(watcher.now())
        return Response(text, media_type=kind)

    return router
