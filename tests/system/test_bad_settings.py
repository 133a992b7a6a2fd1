"""Wrong settings, a wrong backbone, an encoder that is not the right one: one screen that says what came, what was
wanted and what to do; nothing half-written.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsplit.core.config import RunConfig
from fedsplit.trunk.process import hosting
from tests.system.conftest import assert_one_screen, one_object
from tests.system.flower import fedsplit

# The settings, before anything starts.

WRONG = {
    "cut": (["--set", "cut=2-10"], "cut '2-10' is not a cut: two block numbers are wanted, e.g. 2,10"),
    "backward cut": (["--set", "cut=5,2"], "0 <= a <= b is wanted"),
    "unknown key": (["--set", "rouns=3"], "unknown key 'rouns'; did you mean 'rounds'?"),
    "no value": (["--set", "rounds"], "use KEY=VALUE"),
    "no number": (["--set", "rounds=many"], "rounds='many'"),
    "nothing to resume": (["--resume", "gone"], "no run 'gone' to resume"),
    "full width": (["--set", "ｒｏｕｎｄｓ＝３"], "it has full-width characters, write rounds=3"),
    "full-width value": (["--set", "rounds=３"], "it has full-width characters, write rounds=3"),
    "another case": (["--set", "method=FedV"], "did you mean 'fedv'?"),
    "half a name": (["--set", "method=fedavg"], "did you mean 'fedavg-full' or 'fedavg-lora'?"),
    "key in capitals": (["--set", "Batch_Size=3"], "did you mean 'batch-size'?"),
    "no --set": (["rounds=3"], "settings go behind --set, e.g. fedsplit run --set rounds=3"),
    "a setting as an option": (["--rounds", "3"], "--set rounds=VALUE"),
    "backbone": (["--set", "backbone=/nope"], "backbone '/nope' is not a directory here"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_end_before_anything_starts(what: str, tmp_path: Path) -> None:
    args, words = WRONG[what]
    done = fedsplit("run", *args, "--json", cwd=tmp_path, timeout_s=60)
    assert done.returncode == 2
    assert words in one_object(done.stdout)["error"]["message"]
    assert_one_screen(done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_all_faults_at_once(tmp_path: Path) -> None:
    done = fedsplit(
        "run", "--set", "cut=x", "--set", "partition=y", "--set", "min-sites=0", cwd=tmp_path, timeout_s=60
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    for words in ("'x'", "'y'", "min-sites=0"):
        assert words in done.stderr
    assert_one_screen(done.stderr)


# The backbone.


def test_cut_beyond_the_backbone(fails: Callable[..., str], model: Path) -> None:
    assert "cut 2,99 does not fit the backbone: it has 6 blocks" in fails(cut="2,99")
    assert "it has 4 blocks, so 0 <= a <= b <= 4 is wanted" in fails(
        cut="0,4;2,5", backbone=str(model)
    )


def test_model_folder_without_weights(fails: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").unlink()
    message = fails(backbone=str(model))
    for words in (str(model), "has no weights", "model.safetensors", "save_pretrained"):
        assert words in message


def test_model_of_an_unknown_family(fails: Callable[..., str], model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "gpt2"}
    (model / "config.json").write_text(json.dumps(config))
    message = fails(backbone=str(model))
    for words in (str(model), "family 'gpt2'", "known families: bert", "vit"):
        assert words in message


def test_weights_of_another_model(
    fails: Callable[..., str], model: Path, tiny: dict[str, Path]
) -> None:
    shutil.copy(tiny["bert"] / "model.safetensors", model / "model.safetensors")
    assert "lacks" in fails(backbone=str(model))


def test_damaged_weights(fails: Callable[..., str], model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "copy the files again" in fails(backbone=str(model))


def test_no_model_there(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "give a directory in Hugging Face format" in fails(backbone=str(tmp_path / "none"))


# The encoder's address, port and key.


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef" * 4 + "\n")
    return path


def test_port_in_use(fails: Callable[..., str], taken_port: int) -> None:
    message = fails(encoder_bind=f"127.0.0.1:{taken_port}")
    assert f"cannot listen on 127.0.0.1:{taken_port}: the port is in use" in message
    assert "choose another port" in message


def test_listening_everywhere_is_no_address_to_dial(fails: Callable[..., str]) -> None:
    message = fails(encoder_bind="0.0.0.0:0", encoder_insecure=True)
    assert "set encoder-address to the HOST:PORT at which they reach it" in message


def test_encoder_that_is_not_there(fails: Callable[..., str], secret: Path) -> None:
    start = time.monotonic()
    message = fails(encoder_address="127.0.0.1:1", encoder_secret_file=str(secret))
    assert time.monotonic() - start < 30
    assert "no encoder answers at 127.0.0.1:1" in message
    assert "is `fedsplit encoder serve` running there?" in message
    # Dialled from another machine, loopback is the wrong machine.
    assert "encoder-address" in message


def test_certificate_that_is_not_there(fails: Callable[..., str], secret: Path) -> None:
    pem = str(secret.parent / "none.pem")
    message = fails(encoder_tls_cert=pem, encoder_tls_key=pem)
    assert f"the PEM file {pem} cannot be read: No such file" in message
    message = fails(encoder_tls_cert=str(secret), encoder_tls_key=str(secret))
    assert f"{secret} is not a PEM file" in message
    message = fails(
        encoder_address="127.0.0.1:1", encoder_secret_file=str(secret), encoder_tls_ca=pem
    )
    assert f"the PEM file {pem} cannot be read" in message


def test_encoder_elsewhere_without_its_secret(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "encoder-secret-file is wanted" in fails(encoder_address="127.0.0.1:1")
    message = fails(encoder_address="127.0.0.1:1", encoder_secret_file=str(tmp_path / "none"))
    assert f"secret file {tmp_path / 'none'} cannot be read" in message
    assert "--new-secret" in message


def test_encoder_with_another_secret(fails: Callable[..., str], secret: Path) -> None:
    with hosting(RunConfig(), b"x" * 32) as (server, _, _):
        message = fails(encoder_address=server.address, encoder_secret_file=str(secret))
    assert f"the encoder at {server.address} refused" in message
    assert "must share the same key" in message


def test_encoder_with_another_backbone(
    fails: Callable[..., str], secret: Path, model: Path
) -> None:
    with hosting(RunConfig.of(backbone=str(model)), secret.read_bytes().strip()) as (server, _, _):
        message = fails(encoder_address=server.address, encoder_secret_file=str(secret))
    for words in (
        server.address,
        str(model),
        "backbone=vit-glyphs",
        "start the encoder with --backbone",
    ):
        assert words in message


def test_encoder_of_another_version(
    fails: Callable[..., str], secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.trunk.host.__version__", "9.9.9")
    with hosting(RunConfig(), secret.read_bytes().strip()) as (server, _, _):
        message = fails(encoder_address=server.address, encoder_secret_file=str(secret))
    assert "runs fedsplit 9.9.9" in message
    assert "install the same version on both" in message


@pytest.mark.slow
def test_encoder_command(taken_port: int, secret: Path, tmp_path: Path) -> None:
    common = ("encoder", "serve", "--backbone", "vit-glyphs", "--json", "--secret-file")
    cases = {
        "the port is in use": (*common, str(secret), "--bind", f"127.0.0.1:{taken_port}"),
        "--new-secret writes a fresh one": (*common, str(tmp_path / "none")),
        "HOST:PORT is wanted": (*common, str(secret), "--bind", "nonsense"),
    }
    for words, args in cases.items():
        done = fedsplit(*args, cwd=tmp_path, timeout_s=60)
        assert done.returncode in {1, 2}
        assert words in one_object(done.stdout)["error"]["message"]
        assert_one_screen(done.stderr)
    assert not (tmp_path / "none").exists()
