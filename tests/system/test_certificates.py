"""deploy/certificates.py with the real thing: a run whose encoder asks every site for its certificate."""

from __future__ import annotations

import os
import re
import runpy
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from fedsplit.core.errors import FederationError
from fedsplit.core.names import certificate_name
from fedsplit.core.records import Summary
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import Run
from fedsplit.model.backbone import Backbone
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.wiring import ServerTls
from fedsplit.trunk.host import BackboneHost
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
    host = BackboneHost(Backbone.find(config.placement.backbone))
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


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.pem")}


def test_a_second_call_adds_sites_by_the_same_ca(pki: Path) -> None:
    before = files_of(pki)
    args = ["--out", str(pki), "--site", "検査", "--site", "../../up", "--site", "line 3"]
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    after = files_of(pki.parent)
    assert {n: after[f"pki/{n}"] for n in before} == before
    # Nothing outside of --out, and two files a site.
    assert len(after) == len(before) + 6
    ca = x509.load_pem_x509_certificate(before["ca.pem"])
    for site in ("検査", "../../up", "line 3"):
        name = certificate_name(site)
        made = x509.load_pem_x509_certificate(after[f"pki/{name}.pem"])
        made.verify_directly_issued_by(ca)
        assert made.subject.rfc4514_string() == f"CN={name}"
        assert made.not_valid_after_utc <= ca.not_valid_after_utc
    assert all(p.stat().st_mode & 0o077 == 0 for p in pki.glob("*-key.pem"))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--host", "x"], "already holds encoder-key.pem, encoder.pem; nothing was written"),
        (["--site", "new", "--site", "site-0"], "already holds site-0-key.pem, site-0.pem"),
        (["--site", "new", "--site", "NEW"], "files of another one"),
        (["--site", "new", "--site", "new-key"], "files of another one"),
        (["--site", "CA"], "files of another one"),
        (["--host", "検査.example"], "A-label"),
        ([], "nothing to make; give --host for the encoder, --site for each site"),
    ],
)
def test_what_cannot_be_made_leaves_nothing_half_made(
    args: list[str], reason: str, pki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(pki.parent)
    with pytest.raises(SystemExit) as caught:
        certificates(pki, *args)
    assert caught.value.code == 1
    assert re.search(reason, capsys.readouterr().err)
    assert files_of(pki.parent) == before


def test_half_a_ca_is_refused(pki: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pki / "ca-key.pem").unlink()
    with pytest.raises(SystemExit):
        certificates(pki, "--site", "new")
    assert "both are wanted to sign more" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, opened = 0, os.open

    def full(*args: Any) -> int:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")
        return opened(*args)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(SystemExit):
        certificates(tmp_path / "pki", "--host", "h", "--site", "a")
    assert "No space" in capsys.readouterr().err
    assert files_of(tmp_path) == {}


def certificates(out: Path, *args: str) -> None:
    """The script in this process."""
    old, sys.argv = sys.argv, [str(SCRIPT), "--out", str(out), *args]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = old
