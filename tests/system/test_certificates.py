"""deploy/certificates.py with the real thing: a run whose encoder asks every site for its certificate."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.errors import FederationError
from fedsplit.core.records import Summary
from fedsplit.federation.endpoint import Endpoint
from fedsplit.federation.server import Run
from fedsplit.model.backbone import Backbone
from fedsplit.serving.host import BackboneHost
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.wiring import ServerTls
from tests.federation.conftest import settings, simulated
from tests.federation.grid import InProcessGrid

SCRIPT = Path(__file__).parents[2] / "deploy" / "certificates.py"


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    out = tmp_path / "pki"
    args = ["--out", str(out), "--host", "127.0.0.1", "--site", "site-0", "--site", "site-1"]
    subprocess.run([sys.executable, str(SCRIPT), *args], check=True)
    return out


def run_once(tmp_path: Path, pki: Path, nodes: list[dict[str, Any]]) -> Summary:
    config = settings(tmp_path, rounds=1, cut="2,5", max_samples=80)
    tls = ServerTls(cert=pki / "encoder.pem", key=pki / "encoder-key.pem", client_ca=pki / "ca.pem")
    key = secrets.token_bytes(32)
    host = BackboneHost(Backbone.find(config.backbone))
    with EncoderServer(host, key=key, tls=tls) as server:
        ca = str(pki / "ca.pem")
        endpoint = Endpoint(
            server.address, key, tls=True, ca_file=ca, publish=host.publish, collect=host.collect
        )
        grid = InProcessGrid(nodes)
        try:
            return Run(grid, config, endpoint, simulated=True).go()
        finally:
            grid.close()


def with_certificate(pki: Path, node: dict[str, Any], name: str) -> dict[str, Any]:
    files = {"encoder-tls-cert": f"{name}.pem", "encoder-tls-key": f"{name}-key.pem"}
    return node | {key: str(pki / file) for key, file in files.items()}


def test_sites_that_show_their_own_certificate_take_part(tmp_path: Path, pki: Path) -> None:
    nodes = [with_certificate(pki, n, f"site-{i}") for i, n in enumerate(simulated(2))]
    assert run_once(tmp_path, pki, nodes).outcome == "complete"


def test_another_sites_certificate_does_not_help(tmp_path: Path, pki: Path) -> None:
    nodes = [with_certificate(pki, n, "site-0") for n in simulated(2)]
    with pytest.raises(FederationError, match=r"site-1: .*site-0"):
        run_once(tmp_path, pki, nodes)


def test_no_certificate_no_part(tmp_path: Path, pki: Path) -> None:
    nodes = [with_certificate(pki, n, "site-0") for n in simulated(1)] + simulated(2)[1:]
    with pytest.raises(FederationError, match=r"got 1 useful update.*site-1: "):
        run_once(tmp_path, pki, nodes)


def test_nothing_is_overwritten(pki: Path) -> None:
    before = {p.name: p.read_bytes() for p in pki.iterdir()}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(pki), "--host", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "already holds PEM files" in done.stderr
    assert {p.name: p.read_bytes() for p in pki.iterdir()} == before
    assert (pki / "ca-key.pem").stat().st_mode & 0o077 == 0
