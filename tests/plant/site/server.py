"""A small control service for the tests of a site: HTTPS on loopback, real keys and codes, the wire's own models.

Certificates are asked for as the proxy does, and what it would tell (who is there) is not looked at.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

import fedsplit
from fedsplit.core.names import certificate_name
from fedsplit.model.description import described
from fedsplit.plant import paths, pki
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.server.backbone import ServedBackbone, backbone_router
from fedsplit.plant.wire import (
    Hello,
    JoinAnswer,
    JoinRequest,
    RenewAnswer,
    RenewRequest,
    Report,
    ReportAnswer,
)


@dataclass
class Control:
    """What it is, and what the test has it say."""

    ca: pki.Pair
    port: int = 0
    host: str = "127.0.0.1"
    site: str = "line-a"
    version: str = fedsplit.__version__
    clock_s: float = 0.0
    """How far its clock is ahead."""
    days: float = 30.0
    standing: Any = "member"
    cut_after_join: bool = False
    """The join is done and its answer is lost."""
    refusal: tuple[int, str, str] | None = None
    """Status, kind and message of each answer but hello's."""
    codes: dict[str, str] = field(default_factory=dict)
    """Id -> the node key that redeemed it; "" as long as nobody has."""
    node_keys: list[str] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    renewed: int = 0
    backbone: ServedBackbone = field(
        default_factory=lambda: ServedBackbone(lambda: "vit-glyphs", description=described)
    )

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def code(self) -> JoinCode:
        """A new one."""
        made = JoinCode.new(self.address, pki.fingerprint(self.ca.certificate))
        self.codes[made.id] = ""
        return made

    def app(self) -> FastAPI:
        app = FastAPI()

        def refused() -> JSONResponse | None:
            if self.refusal is None:
                return None
            status, kind, message = self.refusal
            return JSONResponse({"error": {"kind": kind, "message": message}}, status)

        @app.get(paths.HELLO)
        def hello() -> Hello:
            return Hello(fedsplit_version=self.version, server_time=time.time() + self.clock_s)

        @app.post(paths.JOIN, response_model=None)
        def join(request: JoinRequest) -> JoinAnswer | JSONResponse:
            if told := refused():
                return told
            used_by = self.codes.get(request.code_id)
            if used_by is None or used_by not in ("", request.node_key):
                word = "is not known here" if used_by is None else "was used already"
                error = {"kind": "code", "message": f"the join code {word}; ask for a new one"}
                return JSONResponse({"error": error}, 403)
            self.codes[request.code_id] = request.node_key
            self.node_keys.append(request.node_key)
            if self.cut_after_join:
                self.cut_after_join = False
                return JSONResponse({"error": {"kind": "away", "message": "the line is cut"}}, 503)
            return JoinAnswer(
                site=self.site,
                certificate=self.certificate(request.csr),
                ca=self.ca.pem.decode(),
                backbone="vit-glyphs",
                backbone_sha256="ab" * 32,
                cut="1,5",
            )

        @app.post(paths.RENEW, response_model=None)
        def renew(request: RenewRequest) -> RenewAnswer | JSONResponse:
            if told := refused():
                return told
            self.renewed += 1
            return RenewAnswer(certificate=self.certificate(request.csr))

        @app.post(paths.REPORT, response_model=None)
        def report(told: Report) -> ReportAnswer | JSONResponse:
            if no := refused():
                return no
            self.reports.append(told)
            return ReportAnswer(standing=self.standing, server_time=time.time())

        @app.get(paths.MANIFEST, response_model=None)
        def manifest() -> Response:
            return refused() or Response(self.backbone.parts().manifest.canonical())

        app.include_router(backbone_router(self.backbone))
        return app

    def certificate(self, csr: str) -> str:
        name = certificate_name(self.site)
        return pki.issue(
            self.ca, csr.encode(), common_name=name, days=self.days, client=True
        ).decode()


@contextlib.contextmanager
def served(
    folder: Path, *, hosts: tuple[str, ...] = ("localhost", "127.0.0.1"), port: int = 0
) -> Iterator[Control]:
    """A control service that runs until the block ends."""
    ca = pki.make_ca("Federation", days=30)
    key = pki.new_key()
    leaf = pki.issue(ca, key.public_key(), common_name=hosts[0], hosts=hosts, days=30, client=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pem").write_bytes(leaf + ca.pem)
    (folder / "server-key.pem").write_bytes(pki.key_pem(key))
    (folder / "ca.pem").write_bytes(ca.pem)
    control = Control(ca)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        control.port = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                control.app(),
                log_level="error",
                ws="none",
                ssl_certfile=str(folder / "server.pem"),
                ssl_keyfile=str(folder / "server-key.pem"),
                ssl_ca_certs=str(folder / "ca.pem"),
                ssl_cert_reqs=ssl.CERT_OPTIONAL,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        try:
            yield control
        finally:
            server.should_exit = True
            thread.join(timeout=10)
