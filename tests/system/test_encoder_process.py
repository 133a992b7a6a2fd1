"""`fedsplit encoder serve` as a process of its own: the same module as with the app's encoder, and what its death does."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.encoder import Grant, Inference
from fedsplit.core.errors import FederationError, FedsplitError, UnreachableError
from fedsplit.federation.server.run import Run, settle
from fedsplit.predict.predictor import load_predictor
from fedsplit.predict.remote import RemoteMiddle, Way
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts
from fedsplit.training import dial
from fedsplit.transport.client import StreamEncoder
from fedsplit.transport.keys import read_key
from fedsplit.transport.tokens import sign
from server_app.app import _endpoint
from tests.federation.conftest import settings, simulated
from tests.federation.grid import InProcessGrid
from tests.system.flower import BIN
from tests.transport.test_tls import Authority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    address: str
    secret: Path


@contextlib.contextmanager
def served(folder: Path, *args: str, bind: str = "127.0.0.1:0") -> Iterator[Served]:
    """A `fedsplit encoder serve` that is ready; ended by its id on the way out."""
    secret = folder / "secret"
    log = folder / "encoder.log"
    with log.open("a") as stderr:
        process = subprocess.Popen(
            [
                str(BIN / "fedsplit"), "encoder", "serve", "--backbone", "vit-glyphs", "--secret-file", str(secret),
                "--new-secret", "--bind", bind, "--threads", "1", "--json", *args,
            ],
            stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, log.read_text()
        yield Served(process, json.loads(first)["address"], secret)
    finally:
        process.kill()
        process.communicate(timeout=20)


@contextlib.contextmanager
def prepared(config: RunConfig, sites: int = 2) -> Iterator[Run]:
    """A run with the encoder that the ServerApp would use for these settings."""
    with _endpoint(config) as endpoint:
        net = InProcessGrid(simulated(sites))
        try:
            yield Run(net, config, endpoint, simulated=True)
        finally:
            net.close()


def of(encoder: Served, **other: Any) -> dict[str, Any]:
    return {"encoder_address": encoder.address, "encoder_secret_file": str(encoder.secret), **other}


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "module" / "adapter_model.safetensors")


def assert_same_module(one: Path, other: Path) -> None:
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not np.array_equal(ours[n], theirs[n])] == []
    assert any(np.any(t) for n, t in ours.items() if ".lora_B." in n)


def assert_predicts(encoder: Served, folder: Path, modules: Path) -> None:
    """What the run left is registered, and the encoder that was there before predicts with it."""
    with ModuleRegistry.open(modules, create=True) as registry:
        version = registry.add(folder, Facts(task="digits"))
    cut = Cut(2, 4)
    grant = Grant.to_predict(
        cut,
        Inference(max_rows=100, rows_per_minute=1000),
        site="a",
        task="digits",
        version=version.digest,
        backbone_sha256=version.backbone_sha256,
    )
    token = sign(grant, read_key(encoder.secret), 60)
    samples = [np.full((8, 8, 3), 20 * i, np.uint8) for i in range(5)]
    whole = load_predictor(folder)
    with RemoteMiddle(lambda: Way(encoder.address, token, grant, 60)) as middle:
        split = load_predictor(folder, middle=middle, cut=cut)
        found = split.outputs([split.prepare(s) for s in samples])
    assert np.array_equal(found, whole.outputs([whole.prepare(s) for s in samples]))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of three rounds with the app's own encoder."""
    runs = tmp_path_factory.mktemp("reference")
    with prepared(settings(runs, rounds=3, cut="0,6;2,4")) as run:
        assert run.go().outcome == "complete"
        return run.dir.path


def test_same_module_as_with_the_apps_encoder(reference: Path, tmp_path: Path) -> None:
    with served(tmp_path, "--registry", str(tmp_path / "modules")) as encoder:
        assert oct(encoder.secret.stat().st_mode)[-3:] == "600"
        config = settings(tmp_path, rounds=3, cut="0,6;2,4", **of(encoder))
        with prepared(config) as run:
            summary = run.go()
        assert summary.outcome == "complete"
        assert_predicts(encoder, run.dir.path / "module", tmp_path / "modules")
        encoder.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert encoder.process.wait(timeout=10) == 0
        assert time.monotonic() - start < 10
        assert encoder.process.stdout is not None
        assert encoder.process.stdout.read() == ""  # the one JSON object was read already
    assert_same_module(reference, run.dir.path)


def test_same_module_over_tls_and_nothing_without(reference: Path, tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ca")
    other = Authority(tmp_path, "other")
    cert, key = ca.issue("localhost")
    with served(tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as encoder:
        config = settings(
            tmp_path, rounds=3, cut="0,6;2,4", **of(encoder, encoder_tls_ca=str(ca.pem))
        )
        with prepared(config) as run:
            assert run.go().outcome == "complete"
        for name, wrong, words in (
            ("plain", {}, "it speaks TLS"),
            ("foreign", {"encoder_tls_ca": str(other.pem)}, "root CA must have signed"),
        ):
            config = settings(tmp_path, run_name=name, **of(encoder, **wrong))
            with pytest.raises(UnreachableError, match=words), prepared(config) as lost:
                lost.go()
        # Ctrl-C ends it like SIGTERM, without a word too many.
        encoder.process.send_signal(signal.SIGINT)
        assert encoder.process.wait(timeout=10) == 0
    assert "Traceback" not in (tmp_path / "encoder.log").read_text()
    assert_same_module(reference, run.dir.path)


class Killing(StreamEncoder):
    """A site's stream during whose fourth step of round 2 something happens to the encoder."""

    happens: Any = None

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        if Killing.happens is not None and self.steps == 3 and self.welcome is not None:
            happens, Killing.happens = Killing.happens, None
            happens()
        return super().encode(*args, **kwargs)


def test_an_encoder_that_is_killed_and_started_again_costs_no_round(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "StreamEncoder", Killing)
    with contextlib.ExitStack() as encoders:
        encoder = encoders.enter_context(served(tmp_path))
        config = settings(tmp_path, rounds=3, cut="0,6;2,4", **of(encoder))

        def restart() -> None:
            encoder.process.kill()
            encoder.process.wait(timeout=10)
            start = partial(served, tmp_path, bind=encoder.address)
            threading.Thread(target=lambda: encoders.enter_context(start())).start()

        with prepared(config) as run:
            save = run.dir.save_checkpoint

            def arm(checkpoint: Any) -> None:
                save(checkpoint)
                if checkpoint.round == 1:
                    Killing.happens = restart

            monkeypatch.setattr(run.dir, "save_checkpoint", arm)
            summary = run.go()
    assert (summary.outcome, summary.rounds_done) == ("complete", 3)
    (note,) = [n for n in summary.notes if "done once more" in n]
    assert note.startswith("round 2 is done once more: ")
    assert_same_module(reference, run.dir.path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_encoder_dies_in_a_round(
    how: signal.Signals, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round ends with a reason that names site and encoder; a new encoder lets the run go on from there."""
    monkeypatch.setattr(dial, "StreamEncoder", Killing)
    with served(tmp_path) as encoder:
        config = settings(tmp_path, rounds=3, cut="0,6;2,4", **of(encoder))

        def die() -> None:
            encoder.process.send_signal(how)
            encoder.process.wait(timeout=10)
            # How long the run waits for another encoder.
            object.__setattr__(config.server, "deadline_s", 5.0)

        with prepared(config) as run:
            strategy_checkpoint = run.dir.save_checkpoint

            def arm(checkpoint: Any) -> None:
                strategy_checkpoint(checkpoint)
                Killing.happens = die

            monkeypatch.setattr(run.dir, "save_checkpoint", arm)
            started = time.monotonic()
            with pytest.raises(FederationError) as caught:
                run.go()
        assert time.monotonic() - started < 60
        text = str(caught.value)
        assert "round 2 got 0 useful updates" in text
        assert "site-0" in text
        assert "site-1" in text
        assert encoder.address in text
        assert "resume=run" in text
        assert "round 1 is kept" in text
        saved = json.loads((run.dir.path / "summary.json").read_text())
        assert saved["outcome"] == "failed"
        assert saved["rounds_done"] == 1
        assert adapter(run.dir.path)
        address = encoder.address
    with served(tmp_path, bind=address) as encoder:
        again = settle(settings(tmp_path, run_name="", resume="run", **of(encoder)))
        with prepared(again) as run:
            summary = run.go()
    assert summary.rounds_done == 3
    assert_same_module(reference, run.dir.path)


def test_run_goes_on_with_the_sites_that_need_no_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min-sites=1: the site that runs all blocks carries the round in which the encoder dies."""
    monkeypatch.setattr(dial, "StreamEncoder", Killing)
    with served(tmp_path) as encoder:
        config = settings(tmp_path, rounds=3, cut="2,4;6,6", min_sites=1, **of(encoder))

        def die() -> None:
            encoder.process.kill()
            encoder.process.wait(timeout=10)
            object.__setattr__(config.server, "deadline_s", 5.0)

        monkeypatch.setattr(Killing, "happens", staticmethod(die))
        with prepared(config) as run, pytest.raises(FedsplitError) as caught:
            run.go()
        assert encoder.address in str(caught.value)
    saved = json.loads((run.dir.path / "summary.json").read_text())
    assert saved["outcome"] == "failed"
    assert saved["rounds_done"] == 1
    (left,) = [entry for entry in saved["left_out"] if entry["site"] == "site-0"]
    assert encoder.address in left["reason"]
    assert adapter(run.dir.path)
    assert not list(tmp_path.rglob("*.part"))
