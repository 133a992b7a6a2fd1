"""The control service: joins, renewals and reports of sites, grants to predict, the backbone's parts, modules in production,
the status page.

    python -m fedsplit.plant.server.control DIR --port PORT

It listens on loopback, behind the proxy at the public port, and believes what the proxy says of a caller's certificate
only beside the secret that both share (core/proxied.py). Bodies are bounded before they are read; what goes wrong is
answered as {"error": {"kind", "message"}}, in words for the person at the site, never a traceback.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.errors import (
    BackboneError,
    ConfigError,
    EnrolmentError,
    FederationError,
    FedsplitError,
    FolderError,
)
from fedsplit.core.foreign import printable
from fedsplit.core.proxied import Proxied, proxied, reason_text
from fedsplit.plant import paths
from fedsplit.plant.server.backbone import ServedBackbone, backbone_router
from fedsplit.plant.server.enrolment import BackboneFacts, Enrolment, refusal
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.inference import InferenceGrants
from fedsplit.plant.server.node_keys import NodeKeys, of_folder
from fedsplit.plant.server.page import page_router
from fedsplit.plant.server.production import ProductionModules, modules_router
from fedsplit.plant.server.registry import Registry, Shown
from fedsplit.plant.wire import (
    MAX_BODY_BYTES,
    GrantAnswer,
    GrantRequest,
    Hello,
    JoinAnswer,
    JoinRequest,
    Refusal,
    RenewAnswer,
    RenewRequest,
    Report,
    ReportAnswer,
)
from fedsplit.transport.keys import read_proxy_secret

if TYPE_CHECKING:
    from fedsplit.federation.control import FlowerControl

log = logging.getLogger(__name__)

_STATUS = {"too-many": 429, "key-used": 409, "code-used": 409}
_BACKBONE_S = 10.0
"""How long a join waits for a backbone that is being read; sites wait for 20 s."""
_Model = TypeVar("_Model", bound=BaseModel)


def create_app(
    folder: FederationFolder,
    *,
    connect: Callable[[], FlowerControl] | None = None,
    backbone: Callable[[], BackboneFacts] | None = None,
) -> FastAPI:
    """The service of a folder. Raises ConfigError, FolderError and OSError for what it cannot use.

    `connect` and `backbone` are for tests: who knows the node keys, and what sites have to fetch.
    """
    registry = Registry(folder)
    node_keys = NodeKeys(folder, registry, connect or (lambda: of_folder(folder)))
    served = _served(folder)
    facts = _Facts(folder.settings.backbone.path, served)
    modules = ProductionModules(folder)
    enrolment = Enrolment(folder, registry, node_keys, backbone or facts, modules.of_task)
    registry.tell_encoder()
    grants = InferenceGrants(folder)
    guard = Guard(registry, read_proxy_secret(folder.proxy_secret))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=node_keys.watch, args=[stop], name="node-keys")
        thread.start()
        if backbone is None:
            facts.start()
        try:
            yield
        finally:
            stop.set()
            await run_in_threadpool(thread.join, 10.0)
            modules.close()
            registry.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    _add_site_paths(app, enrolment, grants, guard)
    # For this machine; the proxy forwards it where the folder says so, with a login.
    app.include_router(page_router(folder))
    app.include_router(backbone_router(served), dependencies=[Depends(guard.member)])
    app.include_router(modules_router(modules, member=guard.member, task_of=registry.task_of))
    _add_errors(app)
    return app


class Guard:
    """Who calls, by the proxy's word."""

    def __init__(self, registry: Registry, secret: bytes) -> None:
        self._registry, self._secret = registry, secret

    def certificate(self, request: Request) -> Proxied:
        """What the proxy has seen of the caller's certificate. Raises EnrolmentError without proxy or certificate."""
        try:
            found = proxied(request.headers.items(), self._secret)
        except ValueError as err:
            log.warning("a call was refused: %s", err)
            found = None
        if found is None:
            raise EnrolmentError(
                "this path is for the proxy at the public port", kind="not-the-proxy"
            )
        if not found.serial:
            raise EnrolmentError(
                "this path wants the site's certificate; join first: fedsplit site join",
                kind="not-member",
            )
        return found

    def shown(self, request: Request) -> Shown:
        """The site of the caller's certificate, however it stands. Raises EnrolmentError."""
        seen = self.certificate(request)
        shown = self._registry.shown(seen.serial)
        if shown.common_name != seen.site:
            # Two CAs may give one number; ours gives it one name.
            shown = Shown("", "", "not-member")
        return shown

    def member(self, request: Request) -> Shown:
        """The site of the caller's certificate, which is in force. Raises EnrolmentError."""
        shown = self.shown(request)
        if shown.standing != "member":
            raise refusal(shown)
        return shown


def _add_site_paths(
    app: FastAPI, enrolment: Enrolment, grants: InferenceGrants, guard: Guard
) -> None:
    @app.get(paths.HELLO)
    def hello() -> Hello:
        return Hello(fedsplit_version=__version__, server_time=time.time())

    @app.post(paths.JOIN)
    async def join(request: Request) -> JoinAnswer:
        wanted = await _body(request, JoinRequest)
        return await run_in_threadpool(enrolment.join, wanted)

    @app.post(paths.RENEW, dependencies=[Depends(guard.member)])
    async def renew(request: Request) -> RenewAnswer:
        wanted = await _body(request, RenewRequest)
        return await run_in_threadpool(enrolment.renew, guard.certificate(request).serial, wanted)

    # A site of before takes no field that it does not know.
    @app.post(paths.REPORT, response_model_exclude_none=True)
    async def report(request: Request) -> ReportAnswer:
        shown = await run_in_threadpool(guard.shown, request)
        told = await _body(request, Report)
        return await run_in_threadpool(enrolment.report, shown, told)

    @app.post(paths.GRANT)
    async def grant(request: Request) -> GrantAnswer:
        shown = await run_in_threadpool(guard.member, request)
        wanted = await _body(request, GrantRequest)
        return await run_in_threadpool(grants.grant, shown, wanted)

    @app.get(paths.AUTHORISE, dependencies=[Depends(guard.member)], status_code=204)
    def authorise() -> Response:
        return Response(status_code=204)


async def _body(request: Request, model: type[_Model]) -> _Model:
    """What a body says, read no further than is allowed. Raises EnrolmentError."""
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    try:
        return model.model_validate_json(bytes(found))
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        where = ".".join(printable(part, limit=60) for part in first["loc"]) or "the body"
        raise HTTPException(
            400,
            f"{where}: {printable(first['msg'], limit=200)}; is the site's fedsplit of another version? Here it is "
            f"{__version__}",
        ) from err


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FedsplitError)
    def ours(_request: Request, err: Exception) -> JSONResponse:
        if isinstance(err, EnrolmentError):
            told = _answer(_STATUS.get(err.kind, 403), err.kind, str(err))
            # Of an answer to its own question the proxy hands on headers alone.
            told.headers[paths.REASON_HEADER] = reason_text(str(err))
            return told
        if isinstance(err, ConfigError):
            return _answer(400, "bad-request", str(err))
        log.error("a call failed: %s", err)
        if isinstance(err, FederationError):
            return _answer(
                503, "superlink", f"{err}. The join code is still good: run the same command again"
            )
        if isinstance(err, BackboneError):
            return _answer(503, "backbone", f"the server cannot say what its backbone is: {err}")
        if isinstance(err, FolderError):
            return _answer(
                503,
                "server-disk",
                "the server cannot write its records; have its administrator look at `fedsplit doctor`, and try again",
            )
        return _answer(500, "internal", "the server failed; its log control.jsonl says why")

    @app.exception_handler(HTTPException)
    def of_http(_request: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, HTTPException)
        return _answer(err.status_code, "bad-request", err.detail)

    @app.exception_handler(Exception)
    def bug(_request: Request, _err: Exception) -> JSONResponse:
        # uvicorn's log has the traceback.
        return _answer(500, "internal", "the server failed; its log control.jsonl says why")


def _answer(status: int, kind: str, message: str) -> JSONResponse:
    told = Refusal(kind=kind, message=printable(message, limit=2000))
    return JSONResponse({"error": told.model_dump()}, status)


def _served(folder: FederationFolder) -> ServedBackbone:
    said = folder.settings.backbone
    private = Cut.parse(said.private_blocks) if said.private_blocks else None
    return ServedBackbone(lambda: said.path, private)


class _Facts:
    """What sites have to fetch. The weights are read in a thread of its own, before the first site asks."""

    def __init__(self, name: str, served: ServedBackbone) -> None:
        self._name, self._served = name, served
        self._looked = threading.Event()

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._look, name="backbone", daemon=True).start()

    def __call__(self) -> BackboneFacts:
        """Raises BackboneError, also while a large one is being read."""
        if not self._looked.wait(_BACKBONE_S):
            raise BackboneError(
                "it is still being read, for the server has just started; run the same command again in a minute"
            )
        return BackboneFacts(self._name, self._served.parts().manifest.sha256)

    def _look(self) -> None:
        try:
            self._served.parts()
        except FedsplitError as err:
            log.error("%s", err)
        finally:
            self._looked.set()


def main() -> None:
    """Serve one folder until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # A line for each of our own calls to the SuperLink is no news.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    app = create_app(FederationFolder.at(args.folder))
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=args.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # The status page's streams do not end by themselves.
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
