"""What is wrong with data, backbone, files or ports is told before Flower starts, once, and nothing is written."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsplit.cli import checks
from fedsplit.cli.request import prepare
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError, ConfigError, DataError, FedsplitError
from fedsplit.federation.server.books.run_dir import RunDir

Refused = Callable[..., str]


@pytest.fixture
def refused(echo_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Prepare a run with these settings; the message, and nothing was written."""
    where = tmp_path / "here"
    where.mkdir()
    monkeypatch.chdir(where)

    def call(kind: type[FedsplitError] = ConfigError, **settings: object) -> str:
        flat = {k.replace("_", "-"): v for k, v in settings.items()}
        with pytest.raises(kind) as caught:
            prepare(flat, app=echo_app)  # type: ignore[arg-type]
        assert list(where.iterdir()) == []
        return str(caught.value)

    return call


def pictures(folder: Path, *classes: str, each: int = 6) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.full((8, 8), 5 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_a_typo_in_the_path_is_told_once(refused: Refused) -> None:
    message = refused(DataError, data="folder:/no/such", sites=9)
    assert message.count("/no/such") == 1
    assert "does not exist" in message
    assert "site-0" not in message


def test_a_path_without_a_kind(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "orders.csv"
    file.write_text("text,label\na,b\n")
    assert f"did you mean folder:{tmp_path}?" in refused(data=str(tmp_path))
    assert f"did you mean csv:{file}?" in refused(data=str(file))
    assert "did you mean" not in refused(data="/no/such")


def test_texts_for_a_backbone_of_images(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "orders.csv"
    file.write_text("text,label\n" + "".join(f"a {i},{i % 2}\n" for i in range(40)))
    assert "holds texts, backbone" in refused(DataError, data=f"csv:{file}")


def test_one_class_is_none(refused: Refused, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", "good", each=40)
    assert "has one class, 'good'" in refused(DataError, data=f"folder:{folder}", partition="iid")


def test_more_sites_than_samples(refused: Refused, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", "good", "bad", each=2)
    refused(FedsplitError, data=f"folder:{folder}", sites=30)


def test_every_task_is_looked_at(refused: Refused) -> None:
    message = refused(tasks="a=folder:/no/a;b=digits;c=folder:/no/c")
    assert message.startswith("2 faults, and nothing was started:")
    assert "/no/a" in message
    assert "/no/c" in message


def test_backbone_and_module(refused: Refused, tmp_path: Path) -> None:
    assert "not a directory" in refused(BackboneError, backbone=str(tmp_path / "none"))
    assert "it has 6 blocks" in refused(cut="2,9")
    assert "module-blocks=9" in refused(module_blocks=9)
    assert "start-module: there is no folder" in refused(start_module=str(tmp_path / "none"))


def test_folder_that_cannot_be_made(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(runs_dir=str(tmp_path / "file" / "runs"))


def test_the_encoders_files_and_port(refused: Refused, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"encoder-bind={bind} cannot be listened on" in refused(encoder_bind=bind)
    assert "[::1]:19197" in refused(encoder_bind="::1:19197")
    gone = str(tmp_path / "gone")
    assert f"secret file {gone} cannot be read" in refused(
        encoder_bind="127.0.0.1:0", encoder_secret_file=gone
    )
    assert f"{gone} cannot be read" in refused(
        encoder_bind="127.0.0.1:0", encoder_tls_cert=gone, encoder_tls_key=gone
    )


def test_an_address_of_ipv6_may_be_listened_on() -> None:
    checks._port("[::1]:0", "::1")


def test_good_settings_pass(
    echo_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {prepare({"task": "検査"}, app=echo_app).config.run.run_name for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("検査-2") for name in names)


def test_a_run_that_is_being_written_is_left_alone(
    echo_app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunDir.create(tmp_path / "runs", "mine", task="digits")
    folder.write_json("config.json", {"config": {}})
    with folder.sole_writer():
        for resume, settings in (("mine", {}), (None, {"run-name": "mine"})):
            with pytest.raises(ConfigError, match="being written by another process now"):
                prepare(settings, app=echo_app, resume=resume)
        with pytest.raises(FedsplitError, match="another process"), folder.sole_writer():
            pass
    with pytest.raises(ConfigError, match="--resume mine"):
        prepare({"run-name": "mine"}, app=echo_app)


def test_a_damaged_registry_is_told_before_the_run(tmp_path: Path) -> None:
    place = tmp_path / "modules"
    place.mkdir()
    config = RunConfig.from_flat({"runs-dir": str(tmp_path), "sites": 2})
    assert not checks.check_here(config)
    (place / "modules.db").write_bytes(b"nonsense" * 100)
    (warning,) = checks.check_here(config)
    assert "module reindex" in warning
