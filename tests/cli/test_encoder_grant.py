"""`fedsplit encoder grant`, and `fedsplit predict --grant`: an encoder of no federation, over TLS, by a file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsplit.cli.main import call
from fedsplit.core.errors import ConfigError
from fedsplit.model.backbone import Backbone
from fedsplit.predict.grant_file import GrantFile
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.transport.keys import read_key, write_new_key
from fedsplit.transport.server import EncoderServer, ServerTls
from fedsplit.trunk.host import BackboneHost
from fedsplit.trunk.registered import in_registry
from tests.predict.samples import photos
from tests.transport.authority import Authority


@dataclass
class Operator:
    """An encoder with its registry, and what its operator types."""

    path: Path
    server: EncoderServer
    module: Path

    def args(self, **changes: str) -> list[str]:
        given = {
            "module": "digits#1", "registry": str(self.path / "modules"), "secret-file": str(self.path / "key"),
            "address": self.server.address, "site": "line-1", "cut": "1,5", "out": str(self.path / "line-1.grant"),
            "tls-ca": str(self.path / "ca.pem"),
        }  # fmt: skip
        pairs = (given | changes).items()
        return ["encoder", "grant", *(word for k, v in pairs for word in (f"--{k}", v)), "--json"]


@pytest.fixture(scope="module")
def operator(
    tmp_path_factory: pytest.TempPathFactory, trained_image_module: Path
) -> Iterator[Operator]:
    path = tmp_path_factory.mktemp("operator")
    shutil.copytree(trained_image_module / "module", path / "module")
    with ModuleRegistry.open(path / "modules", create=True) as registry:
        registry.add(path / "module", Facts(task="digits"))
    write_new_key(path / "key")
    cert, key = Authority(path, "ca").issue("encoder")
    host = BackboneHost(Backbone.find("vit-glyphs"), modules=in_registry(path / "modules"))
    with EncoderServer(
        host, key=read_key(path / "key"), tls=ServerTls(cert=cert, key=key)
    ) as server:
        yield Operator(path, server, path / "module")


def run(capsys: pytest.CaptureFixture[str], args: list[str]) -> tuple[int, Any, str]:
    code = call(args)
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_a_device_predicts_with_the_file_alone(
    operator: Operator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = photos(tmp_path / "photos")
    code, told, said = run(capsys, operator.args(rows="9"))
    assert code == 0
    assert (told["site"], told["cut"], told["rows"]) == ("line-1", "1,5", 9)
    assert "Give it to nobody else" in said
    file = Path(told["file"])
    assert file.stat().st_mode & 0o077 == 0
    assert json.loads(file.read_text())["grant"]["version"] == told["digest"]
    given = ["predict", "--module", str(operator.module), str(pictures), "--json"]
    _, whole, _ = run(capsys, given)
    for _ in range(2):
        code, split, said = run(capsys, [*given, "--grant", str(file)])
        assert (code, split["answers"]) == (0, whole["answers"])
        assert "blocks 1 to 4 run at the encoder at 127.0.0.1" in said
    # 8 of 9 are used.
    code, told, _ = run(capsys, [*given, "--grant", str(file)])
    assert (code, told["error"]["kind"]) == (1, "RefusedError")
    assert (
        "allows 9 samples, 8 are used and this step has 4; ask for a new one"
        in told["error"]["message"]
    )
    big = [*given, "--grant", str(file), "--batch-size", "1"]
    assert run(capsys, big)[0] == 1


def test_what_the_commands_refuse(
    operator: Operator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        "cut": ("3,3", "leaves nothing for the encoder"),
        "module": ("digits#7", "there is no module"),
        "registry": (str(tmp_path), "registry"),
        "secret-file": (str(tmp_path / "no.key"), "cannot be read"),
        "tls-ca": (str(operator.path / "key"), "is not a PEM file"),
        "out": (str(operator.path / "key" / "x"), "cannot be written"),
    }
    for option, (value, text) in wrong.items():
        code, told, _ = run(capsys, operator.args(**{option: value}))
        assert code == 2, option
        assert text in told["error"]["message"]
    shutil.copytree(operator.module, tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("changed")
    about = tmp_path / "other" / "fedsplit.json"
    about.write_text(about.read_text() + " ")
    code, told, _ = run(capsys, operator.args(module=str(tmp_path / "other")))
    assert code == 2
    assert "so the encoder does not have it" in told["error"]["message"]
    out = str(tmp_path / "a.grant")
    assert run(capsys, operator.args(out=out))[0] == 0
    given = ["predict", "--module", str(operator.module), str(photos(tmp_path / "p")), "--json"]
    cases: list[tuple[list[str], str]] = [
        (["--grant", out, "--site", str(tmp_path)], "--site and --grant both say which encoder"),
        (["--grant", out, "--cut", "1,5"], "--cut goes with --site"),
        (["--tls-cert", out, "--tls-key", out], "go with --grant"),
        (["--grant", out, "--tls-cert", out], "go together"),
        (["--grant", str(tmp_path)], "cannot be read"),
        (["--grant", str(operator.path / "ca.pem")], "cannot be read"),
    ]
    for more, text in cases:
        code, told, _ = run(capsys, [*given, *more])
        assert code == 2, more
        assert text in told["error"]["message"]
    other = ["predict", "--module", str(tmp_path / "other"), str(tmp_path / "p"), "--json"]
    code, told, _ = run(capsys, [*other, "--grant", out])
    assert code == 2
    assert "is for module" in told["error"]["message"]


def test_a_grant_file_is_read_with_distrust(
    operator: Operator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, operator.args(out=str(tmp_path / "a.grant")))[0] == 0
    good = json.loads((tmp_path / "a.grant").read_text())

    def refusal(value: Any) -> str:
        (tmp_path / "b.grant").write_text(json.dumps(value))
        with pytest.raises(ConfigError, match="encoder grant") as caught:
            GrantFile.read(tmp_path / "b.grant")
        return str(caught.value)

    assert GrantFile.read(tmp_path / "a.grant").way().seconds > 3000
    assert "ended 5 minutes ago" in refusal(good | {"ends": time.time() - 300})
    grant = {k: v for k, v in good["grant"].items() if k != "inference"}
    assert "a grant of a run" in refusal(good | {"grant": grant})
    assert "fedsplit_grant" in refusal(good | {"fedsplit_grant": 2})
    assert "address" in refusal(good | {"address": ""})

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([*good, "more"]), st.none() | st.text(max_size=5) | st.lists(st.integers())
    )
    def fuzzed(key: str, value: Any) -> None:
        if key != "ca" or not isinstance(value, str):
            (tmp_path / "c.grant").write_text(json.dumps(good | {key: value}))
            try:
                GrantFile.read(tmp_path / "c.grant")
            except ConfigError:
                return
            assert key in ("address", "token")

    fuzzed()
    (tmp_path / "d.grant").write_bytes(b" " * (1 << 20))
    with pytest.raises(ConfigError, match="cannot be read"):
        GrantFile.read(tmp_path / "d.grant")
