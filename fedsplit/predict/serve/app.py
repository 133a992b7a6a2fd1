"""The paths of a service that predicts, and what they answer. docs/how-to/serve.md shows them with curl.

    POST /v1/predict   an image as the body, or JSON -> class, probability, module
    GET  /v1/module    the module in use: digest, task, classes, backbone
    GET  /health       does it answer; the only path without a token
    GET  /metrics      Prometheus' form, where its client is installed
    GET  /openapi.json all of this, for programs

Refusals are {"error": {"kind", "message"}}. What a page of documentation would load from outside is not served.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from fedsplit import __version__
from fedsplit.core.errors import (
    ConfigError,
    DataError,
    EncoderError,
    FedsplitError,
    OverloadedError,
    ServiceError,
)
from fedsplit.core.foreign import printable
from fedsplit.predict.predictor import Predictor
from fedsplit.predict.serve.answering import Answering
from fedsplit.predict.serve.bodies import MAX_ITEMS, Room, read_body, samples_of
from fedsplit.predict.serve.counts import Counts, exposition
from fedsplit.predict.serve.gate import HEALTH, PREDICT, refusal

_HTTP_KINDS = {
    400: "bad-request", 404: "no-such-path", 405: "method", 408: "slow", 413: "too-long", 415: "type"
}  # fmt: skip


_UNKNOWN = f"there is no such path or method; POST {PREDICT}, or GET /v1/module, {HEALTH}, /metrics, /openapi.json"


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class Prediction(_Shown):
    """What a module says of one sample."""

    class_: str = Field(alias="class")
    """The class with the largest probability."""
    probability: float
    scores: dict[str, float] | None = None
    """Class -> probability, on request."""
    module: str
    """The digest of the module that answered."""


class Number(_Shown):
    """What a module that predicts a number says of one sample."""

    number: float
    """In the unit of the data."""
    module: str


class BackboneInUse(_Shown):
    """What the module stands on."""

    sha256: str
    model_type: str


class ModuleInUse(_Shown):
    """The module that answers the next request."""

    module: str
    """Its digest."""
    name: str
    task: str
    kind: str
    """What a sample is: image or text."""
    target: str
    """What comes out: class or number."""
    classes: tuple[str, ...]
    backbone: BackboneInUse
    fedsplit_version: str
    in_use_since: float
    """Seconds since the epoch."""


class Health(_Shown):
    """Does the service answer, and how did it so far."""

    status: str
    """ok, or waiting: no module is in use yet."""
    module: str
    """The digest of the module in use; empty where there is none."""
    fault: str = ""
    """Why a newer module is not in use."""
    waiting: int
    """Samples taken and not answered."""
    answered: int
    """Requests to predict since the start."""
    refused: int
    samples: int
    p50_ms: float | None
    """From head to answer, of the last requests; null before the first."""
    p99_ms: float | None
    uptime_s: float


class Fault(_Shown):
    kind: str
    message: str


class Refusal(_Shown):
    """Why there is no answer."""

    error: Fault


Answer = Prediction | Number | list[Prediction] | list[Number]
_TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_IMAGE = {
    "type": "object",
    "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
    "required": ["image"],
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "text/plain": {"schema": {"type": "string"}},
            "application/json": {
                "schema": {
                    "oneOf": [
                        _TEXT, _IMAGE, {"type": "array", "maxItems": MAX_ITEMS, "items": {"oneOf": [_TEXT, _IMAGE]}}
                    ]
                }
            },
        },
    }
}  # fmt: skip
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": why}
    for status, why in {
        400: "The request is malformed.",
        401: "The token is missing or wrong.",
        403: "Asked for by another name than this machine's.",
        408: "The body came too slowly.",
        413: "The body is too long.",
        415: "The body is of a type that the module does not read.",
        422: "A sample cannot be read.",
        500: "The service failed.",
        502: "The encoder between head and tail does not answer.",
        503: "Too much waits, or no module is in use; Retry-After says when to ask again.",
    }.items()
}


def create_app(answering: Answering, counts: Counts, *, fault: Any = None) -> FastAPI:
    """The paths over what answers. `fault`: says why a newer module is not in use, empty where nothing is wrong."""
    app = FastAPI(
        title="fedsplit serve",
        version=__version__,
        description="Predictions of a trained module.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    room = Room()

    @app.post(
        PREDICT,
        response_model=Answer,
        response_model_exclude_none=True,
        responses=_REFUSALS,
        openapi_extra=_BODY,
    )
    async def predict(request: Request, scores: bool = False) -> Response:
        """Classify an image or a text, or a list of them. `scores`: with the probability of every class."""
        told = request.state.told
        with answering.place() as place, room.held() as held:
            body = await read_body(request, held, _in_use(answering).kind)
            answered = await asyncio.wrap_future(
                answering.submit(place, lambda predictor: samples_of(body, predictor))
            )
        module = answered.predictor.found.digest
        found = [one.record(scores=scores) | {"module": module} for one in answered.answers]
        told |= {"samples": len(found), "module": module}
        return JSONResponse(found if body.is_list else found[0])

    @app.get("/v1/module", responses={503: _REFUSALS[503]})
    def module_in_use() -> ModuleInUse:
        """The module that answers the next request."""
        return _shown(_in_use(answering), answering.in_use_since)

    @app.get(HEALTH, responses={503: {"model": Health, "description": "No module is in use yet."}})
    def health() -> JSONResponse:
        """Does it answer?"""
        predictor = answering.predictor
        now = Health(
            status="ok" if predictor else "waiting",
            module=predictor.found.digest if predictor else "",
            fault=fault() if fault else "",
            waiting=answering.waiting,
            uptime_s=round(time.time() - counts.began, 1),
            **counts.shown(),
        )
        return JSONResponse(now.model_dump(), 200 if predictor else 503)

    @app.get("/metrics", response_class=Response, responses={501: {"model": Refusal}})
    def metrics() -> Response:
        """Counters and latencies in Prometheus' form."""
        try:
            text, kind = exposition(counts, answering)
        except ConfigError as err:
            return refusal(501, "not-installed", f"{err}; /health has the numbers as JSON")
        return Response(text, media_type=kind)

    _add_errors(app)
    return app


def _in_use(answering: Answering) -> Predictor:
    predictor = answering.predictor
    if predictor is None:
        raise ServiceError("no module is in use here yet; ask again once one has been promoted")
    return predictor


def _shown(predictor: Predictor, since: float) -> ModuleInUse:
    return ModuleInUse(
        module=predictor.found.digest,
        name=predictor.found.name,
        task=predictor.found.task,
        kind=predictor.kind,
        target="class" if predictor.spec.numbers is None else "number",
        classes=predictor.classes,
        backbone=BackboneInUse(
            sha256=predictor.backbone.sha256, model_type=predictor.backbone.family.model_type
        ),
        fedsplit_version=__version__,
        in_use_since=since,
    )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FedsplitError)
    def ours(_request: Request, err: Exception) -> JSONResponse:
        if isinstance(err, DataError):
            return refusal(422, "data", str(err))
        if isinstance(err, OverloadedError):
            return _later(refusal(503, "full", str(err)), err.retry_after_s)
        if isinstance(err, ServiceError):
            return _later(refusal(503, "service", str(err)), 5.0)
        if isinstance(err, EncoderError):
            return refusal(502, "encoder", str(err))
        return refusal(500, "internal", str(err))

    @app.exception_handler(HTTPException)
    def of_http(_request: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, HTTPException)
        told = _UNKNOWN if err.status_code in (404, 405) else err.detail
        made = refusal(err.status_code, _HTTP_KINDS.get(err.status_code, "bad-request"), told)
        made.headers.update(err.headers or {})
        return made

    @app.exception_handler(RequestValidationError)
    def of_query(_request: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, RequestValidationError)
        first = err.errors()[0]
        where = ".".join(printable(part, limit=60) for part in first["loc"])
        return refusal(422, "query", f"{where}: {first['msg']}; correct it")

    @app.exception_handler(Exception)
    def bug(_request: Request, _err: Exception) -> JSONResponse:
        # uvicorn's log has the traceback.
        return refusal(500, "internal", "the service failed; its log says why")


def _later(made: JSONResponse, wait_s: float) -> JSONResponse:
    made.headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return made
