"""What others rely on: public names, committed protobuf code, and what the transport may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsplit.transport import client, encoder_pb2, frames, server, tokens, wiring

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "fedsplit" / "transport"


def test_public_names() -> None:
    assert set(client.__all__) == {
        "ClientTls",
        "StreamEncoder",
        "Traffic",
        "capabilities",
        "collect",
        "publish",
    }
    assert set(server.__all__) == {"EncoderServer", "Limits", "ServerTls", "Stats"}
    assert all(hasattr(tokens, n) for n in ("sign", "verify", "sign_publisher", "verify_publisher"))
    assert encoder_pb2.DESCRIPTOR.services_by_name["Encoder"].full_name == wiring.SERVICE


def test_the_committed_protobuf_code_is_the_protos(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    proto = "fedsplit/transport/encoder.proto"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *out, proto], cwd=ROOT, check=True
    )
    for name in ("encoder_pb2.py", "encoder_pb2.pyi"):
        fresh = (tmp_path / "fedsplit" / "transport" / name).read_text()
        assert fresh == (FOLDER / name).read_text(), (
            f"{name} is stale: the command is at the top of encoder.proto"
        )


def test_a_device_loads_neither_torch_nor_server_code() -> None:
    code = (
        "import sys; import fedsplit.transport.client; "
        "bad = {'torch', 'flwr', 'transformers', 'fedsplit.transport.server', 'fedsplit.transport.session', 'jwt'}; "
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_the_page_and_the_code_agree() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    for kind in frames.FrameKind:
        assert f"| {kind.value} | {kind.name} |" in page
    for dtype in list(frames.Dtype)[1:]:
        assert f"{dtype.value} {dtype.name.lower()}" in page
    assert f"{frames.HEADER_BYTES} bytes of header" in page
