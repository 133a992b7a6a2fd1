"""What a user gets wrong: one screen that says what came, what was wanted and what to do; nothing half-written.

Most of it runs in this process: `fails` is the ServerApp's own code over real ClientApps, and its errors go
through what `fedsplit run --json` makes of Flower's log or of the summary. Real Flower processes are started
where only they can show it: orphans, Ctrl-C, SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import textwrap
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from fedsplit.cli.console import Output, print_error
from fedsplit.cli.execute import error_in_log
from fedsplit.cli.run import finish
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FedsplitError, RunDirError
from fedsplit.core.records import RoundMetrics, Summary
from fedsplit.federation.run_dir import RunDir
from fedsplit.federation.server import Run, settle
from fedsplit.serving.process import hosting
from server_app.app import _endpoint
from tests.federation.conftest import simulated
from tests.federation.grid import InProcessGrid
from tests.system.flower import BIN, fedsplit

SCREEN = (24, 80)
BASE: dict[str, Any] = {
    "max-samples": 80, "rounds": 1, "cut": "0,6", "run-name": "run", "partition": "iid", "deadline-s": 60.0,
}  # fmt: skip
Nodes = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What every message must be.


def assert_one_screen(text: str) -> None:
    """A person can read it at once, on a terminal of the usual size."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, SCREEN[1]) or [""]]
    assert 0 < len(lines) <= SCREEN[0], text
    assert "Traceback" not in text
    assert 'File "' not in text


def one_object(stdout: str) -> dict[str, Any]:
    """`--json` is one JSON object on stdout and nothing else."""
    value = json.loads(stdout)
    assert isinstance(value, dict)
    return value


def run_once(
    flat: dict[str, Any], nodes: Nodes, *, in_simulation: bool = True, **grid: Any
) -> Summary:
    """What server_app does with these settings, in this process."""
    config = settle(RunConfig.from_flat(flat))
    with _endpoint(config) as endpoint:
        net = InProcessGrid(nodes, **grid)
        try:
            return Run(net, config, endpoint, simulated=in_simulation).go()
        finally:
            net.close()


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run with bad settings; returns the message, as the command shows it and as it gives it with --json."""

    def call(nodes: Nodes | None = None, *, in_simulation: bool = True, **other: Any) -> str:
        flat = BASE | {"runs-dir": str(tmp_path / "runs")}
        flat |= {k.replace("_", "-"): v for k, v in other.items()}
        with pytest.raises(FedsplitError) as caught:
            run_once(flat, simulated(2) if nodes is None else nodes, in_simulation=in_simulation)
        assert_nothing_half_written(tmp_path)
        capsys.readouterr()
        folder = tmp_path / "runs" / str(flat["run-name"])
        if (folder / "summary.json").is_file():
            summary = Summary.model_validate_json((folder / "summary.json").read_text())
            assert summary.outcome == "failed"
            assert summary.reason == str(caught.value)
            assert json.loads((folder / "status.json").read_text())["phase"] == "failed"
            assert finish(summary, folder, Output(as_json=True)) == 1
        else:
            assert not folder.exists()
            log = (
                "".join(traceback.format_exception(caught.value))
                + "\x1b[91mERROR \x1b[0m:     Exit Code: 700\n\nx\n"
            )
            kind, message = error_in_log(log)
            assert (kind, message) == (type(caught.value).__name__, str(caught.value))
            print_error(kind, message, as_json=True)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        error = one_object(shown.out)["error"]
        assert error["kind"]
        assert str(caught.value) in error["message"]
        assert_one_screen(error["message"])
        return str(error["message"])

    return call


def assert_nothing_half_written(root: Path) -> None:
    assert list(root.rglob("*.part")) == []


# The settings, before anything starts.

WRONG = {
    "cut": (["--set", "cut=2-10"], "cut '2-10' is not a cut: two block numbers are wanted, e.g. 2,10"),
    "backward cut": (["--set", "cut=5,2"], "0 <= a <= b is wanted"),
    "unknown key": (["--set", "rouns=3"], "unknown key 'rouns'; did you mean 'rounds'?"),
    "no value": (["--set", "rounds"], "use KEY=VALUE"),
    "no number": (["--set", "rounds=many"], "rounds='many'"),
    "nothing to resume": (["--resume", "gone"], "no run 'gone' to resume"),
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


@pytest.fixture
def model(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder of 4 blocks that a test may spoil."""
    return Path(shutil.copytree(tiny["vit"], tmp_path / "model"))


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
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


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
    with hosting(RunConfig(backbone=str(model)), secret.read_bytes().strip()) as (server, _, _):
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
    monkeypatch.setattr("fedsplit.serving.host.__version__", "9.9.9")
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


# The sites.


def test_more_sites_than_supernodes(fails: Callable[..., str]) -> None:
    assert "--federation-config 'num-supernodes=5'" in fails(sites=5)
    message = fails(in_simulation=False, sites=5, min_sites=5, deadline_s=1.0, run_name="deployed")
    for words in ("2 sites are connected", "min-sites=5", "flower-supernode"):
        assert words in message


def test_fewer_supernodes_than_sites_is_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried = SimpleNamespace(monotonic=iter(range(0, 10**6, 100)).__next__, sleep=lambda _: None)
    monkeypatch.setattr("fedsplit.federation.roll_call.time", hurried)
    flat = BASE | {"runs-dir": str(tmp_path), "sites": 3, "cut": "6,6"}
    summary = run_once(flat, simulated(2), in_simulation=False)
    assert summary.outcome == "partial"
    assert [(e.site, e.reason) for e in summary.left_out] == [
        ("(site 3 of 3)", "it was not connected")
    ]


def test_two_sites_of_one_name(fails: Callable[..., str]) -> None:
    message = fails([n | {"site": "press-3"} for n in simulated(2)])
    assert "another site is called 'press-3' too; give each its own name" in message


def test_site_with_another_version(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.federation.site.__version__", "9.9.9")
    assert "this site 9.9.9; install the same version on both" in fails()


def test_node_config_with_every_kind_of_fault(fails: Callable[..., str]) -> None:
    message = fails([simulated(2)[0], {"site": "x" * 500, "cut": "a", "thread": 1, "threads": -1}])
    for words in ("thread", "threads=-1", "cut 'a'", "site="):
        assert words in message


def test_sites_own_cut_beyond_the_backbone(fails: Callable[..., str]) -> None:
    nodes = simulated(2)
    nodes[1]["cut"] = "2,9"
    message = fails(nodes)
    assert "cut 2,9 does not fit the backbone" in message
    assert "site-1" in message


# A site's data.


def write_images(folder: Path, classes: str = "ab", count: int = 6) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((16, 16, 3), 20 * i + ord(name), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def corrupt(folder: Path) -> Path:
    (folder / "b" / "3.png").write_bytes(b"no image")
    return folder / "b" / "3.png"


def unknown_label(folder: Path) -> Path:
    (folder / "c").mkdir()
    return Path(shutil.copy(folder / "a" / "0.png", folder / "c"))


def empty_class(folder: Path) -> Path:
    for file in (folder / "b").iterdir():
        file.unlink()
    return folder / "b"


def one_sample(folder: Path) -> Path:
    shutil.rmtree(folder / "b")
    for i in range(1, 6):
        (folder / "a" / f"{i}.png").unlink()
    return folder


def no_files(folder: Path) -> Path:
    shutil.rmtree(folder)
    return folder


SPOILED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "corrupt image": (corrupt, "replace or remove the file"),
    "unknown label": (unknown_label, "label 'c' is not one of the task's classes: 'a', 'b'"),
    "empty class": (empty_class, "the class folder has no image; add files"),
    "one sample": (one_sample, "only one sample"),
    "no files": (no_files, "does not exist; check the path"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_bad_data_at_a_site(what: str, fails: Callable[..., str], tmp_path: Path) -> None:
    spoil, words = SPOILED[what]
    good, bad = write_images(tmp_path / "good"), write_images(tmp_path / "bad")
    culprit = spoil(bad)
    nodes = [
        {"site": "press-1", "data": f"folder:{good}"}, {"site": "press-2", "data": f"folder:{bad}"},
    ]  # fmt: skip
    message = fails(nodes, classes="a,b", max_samples=0)
    for part in ("press-2: ", str(culprit), words, "1 of 2 sites can take part, min-sites=2"):
        assert part in message
    assert "press-1" not in message


def test_image_that_only_decoding_finds_out(tmp_path: Path) -> None:
    """Half a JPEG has a good header: its site is left out of the round, by name and file, and the others go on."""
    nodes = []
    for name in ("press-1", "press-2"):
        folder = write_images(tmp_path / name)
        nodes.append({"site": name, "data": f"folder:{folder}"})
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for i in range(6):
        path = tmp_path / "press-2" / "a" / f"{i}.jpg"
        Image.fromarray(picture).save(path, quality=95)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    flat = BASE | {
        "runs-dir": str(tmp_path / "runs"),
        "max-samples": 0,
        "min-sites": 1,
        "cut": "6,6",
    }
    summary = run_once(flat, nodes)
    assert summary.outcome == "partial"
    reasons = [e.reason for e in summary.left_out if e.site == "press-2"]
    assert reasons
    assert all(".jpg: not a readable image" in r and "press-2" in r for r in reasons)
    assert "press-2" in summary.reason


# The disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_disk_fills_up_in_a_run(
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flat = BASE | {"runs-dir": str(small_disk), "rounds": 3}
    ballast = small_disk / "ballast"
    save = RunDir.save_checkpoint

    def save_and_fill(self: RunDir, checkpoint: Any) -> None:
        save(self, checkpoint)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 65536):
                pass

    monkeypatch.setattr(RunDir, "save_checkpoint", save_and_fill)
    with pytest.raises(RunDirError) as caught:
        run_once(flat, simulated(2))
    monkeypatch.undo()
    message = str(caught.value)
    for words in (str(small_disk / "run"), "No space left on device", "resume=run", "runs-dir"):
        assert words in message
    assert_one_screen(message)
    assert error_in_log("".join(traceback.format_exception(caught.value))) == (
        "RunDirError",
        message,
    )
    assert_nothing_half_written(small_disk)
    kept = RunDir(small_disk / "run").last_checkpoint()
    assert kept.round == 1
    assert kept.module
    # With room again the run goes on from there.
    ballast.unlink()
    summary = run_once(flat | {"resume": "run", "run-name": ""}, simulated(2))
    assert summary.rounds_done == 3
    assert (small_disk / "run" / "module" / "adapter_model.safetensors").is_file()


def test_runs_dir_that_cannot_be_written(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = fails(runs_dir=str(tmp_path / "file"))
    assert f"run directory {tmp_path / 'file' / 'run'} cannot be written" in message
    assert "set runs-dir" in message


# Real processes: what is left when a run is stopped.


@contextlib.contextmanager
def marked() -> Iterator[tuple[dict[str, str], Callable[[], list[str]]]]:
    """An environment that all descendants inherit, and who of them still runs."""
    mark = uuid.uuid4().hex
    env = dict(os.environ) | {"FEDSPLIT_TEST_MARK": mark, "COLUMNS": "100"}

    def alive() -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get("FEDSPLIT_TEST_MARK") == mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        return found

    try:
        yield env, alive
    finally:
        for entry in alive():
            with contextlib.suppress(psutil.Error):
                psutil.Process(int(entry.split()[0])).kill()


def start(env: dict[str, str], cwd: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "fedsplit"), *args], env=env, cwd=cwd, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 200.0) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not come within {timeout_s:g} s"
        time.sleep(0.05)


def assert_whole(folder: Path) -> int:
    """The run's folder can be read; its last round."""
    assert_nothing_half_written(folder)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        RoundMetrics.model_validate_json(line)
    json.loads((folder / "config.json").read_text())
    json.loads((folder / "status.json").read_text())
    return RunDir(folder).last_checkpoint().round


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_then_sigterm_then_the_run_completes(tmp_path: Path) -> None:
    settings = {
        "rounds": 30,
        "sites": 2,
        "max-samples": 60,
        "run-name": "stopped",
        "partition": "iid",
    }
    sets = [arg for k, v in settings.items() for arg in ("--set", f"{k}={v}")]
    folder = tmp_path / "runs" / "stopped"
    rounds = []
    with marked() as (env, alive):
        for number, args, kind, code in (
            (signal.SIGINT, ["run", *sets], "Interrupted", 130),
            (signal.SIGTERM, ["run", "--resume", "stopped"], "Terminated", 143),
        ):
            process = start(env, tmp_path, *args, "--json")
            wait_for(folder / "checkpoints" / f"round-{max(rounds, default=0) + 2:05d}", process)
            if number is signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does it
            else:
                process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == code
            error = one_object(out)["error"]
            assert error["kind"] == kind
            assert "fedsplit run --resume stopped" in error["message"]
            assert "Traceback" not in err
            assert alive() == []
            rounds.append(assert_whole(folder))
            if (folder / "summary.json").exists():
                # Where the app outlived its sites for a moment it could still say so.
                assert json.loads((folder / "summary.json").read_text())["outcome"] == "failed"
        assert 2 <= rounds[0] < rounds[1] < 30
        done = start(env, tmp_path, "run", "--resume", "stopped", "--json")
        out, err = done.communicate(timeout=300)
        assert done.returncode == 0, err
        assert alive() == []
    summary = one_object(out)
    assert summary["rounds_done"] == 30
    assert summary["outcome"] == "complete"
    assert len(summary["accuracy_by_round"]) == 31
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 31
    assert_whole(folder)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_error_within_flower_reaches_the_screen(model: Path, tmp_path: Path) -> None:
    """The one door that `fails` stands in for: ServerApp -> Flower's log -> the command."""
    (model / "model.safetensors").unlink()
    cwd = tmp_path / "work"
    cwd.mkdir()
    with marked() as (env, alive):
        process = start(env, cwd, "run", "--set", f"backbone={model}", "--set", "sites=2", "--json")
        out, err = process.communicate(timeout=200)
        assert alive() == []
    assert process.returncode == 1
    error = one_object(out)["error"]
    assert error["kind"] == "BackboneError"
    assert "has no weights" in error["message"]
    assert_one_screen(err)
    assert list(cwd.iterdir()) == []
