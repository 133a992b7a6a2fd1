"""A run's folder after every accident: kill, damage, full disk. The last whole checkpoint is never lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedsplit.core.errors import RunDirError
from fedsplit.core.records import RoundMetrics, Status
from fedsplit.federation.server import known_nodes
from fedsplit.federation.server.books.run_dir import KEEP, MANIFEST, MODULE_FILE, Checkpoint, RunDir
from tests.core.test_records import METRICS
from tests.small_disk import small_disk


def run_dir(root: Path, name: str = "r") -> RunDir:
    made = RunDir.create(root, name, task="digits")
    made.write_json("config.json", {"config": {"rounds": 3}})
    return made


def checkpoint(round_: int, *, size: int = 4) -> Checkpoint:
    module = {"w": np.full(size, round_, dtype="f4"), "b": np.zeros((1, 2), dtype="f4")}
    return Checkpoint(round_, module, {"wall_s": 1.5 * round_, "absences": [[1, "a", "why"]]})


def metrics(round_: int, site: str = "a") -> RoundMetrics:
    return RoundMetrics.model_validate(METRICS | {"round": round_, "site": site})


def folder(run: RunDir, round_: int) -> Path:
    return run.path / "checkpoints" / f"round-{round_:05d}"


# The folder.


def test_a_run_is_named_after_its_task_and_date(tmp_path: Path) -> None:
    first, second = (RunDir.create(tmp_path / "runs", "", task="digits") for _ in range(2))
    assert first.name.startswith("digits-20")
    assert first.path.is_dir()
    assert first.path.is_absolute()
    assert second.name >= first.name


def test_an_existing_run_is_not_written_over(tmp_path: Path) -> None:
    run_dir(tmp_path)
    with pytest.raises(RunDirError, match=r"run 'r' is already in .*resume=r"):
        RunDir.create(tmp_path, "r", task="digits")
    # A folder that never became a run may be used.
    (tmp_path / "empty").mkdir()
    assert RunDir.create(tmp_path, "empty", task="digits").name == "empty"


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match=r"file/r cannot be .*: Not a directory; .*runs-dir"):
        RunDir.create(tmp_path / "file", "r", task="digits")


def test_reopening(tmp_path: Path) -> None:
    run_dir(tmp_path)
    (tmp_path / "no-run").mkdir()
    assert RunDir.reopen(tmp_path, "r").read_config() == {"config": {"rounds": 3}}
    for name in ("lost", "no-run"):
        with pytest.raises(RunDirError, match=rf"no run '{name}' .* to go on from; runs: \['r'\]"):
            RunDir.reopen(tmp_path, name)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", "[" * 99_999, '{"config": []}', "\ud800"]
)
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    (run.path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunDirError, match=r"config\.json cannot be read"):
        RunDir.reopen(tmp_path, "r").read_config()


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    for phase in ("waiting", "training"):
        run.set_status(Status(phase=phase, round=0, rounds=1, sites=("ä",), replied=()))
    assert json.loads((run.path / "status.json").read_text("utf-8"))["phase"] == "training"
    assert not list(run.path.glob(".*"))


# Metrics.


def test_metrics_are_appended(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    assert run.read_metrics() == []
    lines = [metrics(1), metrics(1, "Süd"), metrics(2)]
    for line in lines:
        run.add_metrics(line)
    assert RunDir.reopen(tmp_path, "r").read_metrics() == lines


@pytest.mark.parametrize("half", [b'{"round": 2, "si', b'{"site": "S\xc3', b"{", METRICS])
def test_half_a_last_line_does_not_count(half: bytes | dict[str, object], tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.add_metrics(metrics(1))
    with (run.path / "metrics.jsonl").open("ab") as file:
        # A line without its end does not count even where it can be read.
        file.write(half if isinstance(half, bytes) else json.dumps(half).encode())
    assert run.read_metrics() == [metrics(1)]
    # Going on first cuts the file, so that the next line does not end up behind the half one.
    run.forget_after(1)
    run.add_metrics(metrics(2))
    assert run.read_metrics() == [metrics(1), metrics(2)]


@pytest.mark.parametrize("line", [b"{}\n", b"nonsense\n", b"\xff\xfe\n", b'{"round": 1}\n'])
def test_a_damaged_line_is_an_error_of_the_run_directory(line: bytes, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    (run.path / "metrics.jsonl").write_bytes(line)
    run.add_metrics(metrics(1))
    for call in (run.read_metrics, lambda: run.forget_after(1)):
        with pytest.raises(RunDirError, match=r"metrics\.jsonl has a line that cannot be read"):
            call()


def test_going_on_forgets_later_rounds(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    for round_ in (1, 2, 3):
        run.add_metrics(metrics(round_))
        run.add_metrics(metrics(round_, "b"))
    run.forget_after(2)
    assert [m.round for m in run.read_metrics()] == [1, 1, 2, 2]
    run.forget_after(0)
    assert run.read_metrics() == []


# Checkpoints.


def assert_same(got: Checkpoint, want: Checkpoint) -> None:
    assert (got.round, got.state) == (want.round, want.state)
    assert got.module.keys() == want.module.keys()
    assert all(np.array_equal(got.module[n], want.module[n]) for n in want.module)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.save_checkpoint(checkpoint(1))
    assert_same(RunDir.reopen(tmp_path, "r").last_checkpoint(), checkpoint(1))
    manifest = json.loads((folder(run, 1) / MANIFEST).read_text())
    assert set(manifest["sha256"]) == {MODULE_FILE}
    assert len(manifest["sha256"][MODULE_FILE]) == 64


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    for round_ in range(1, 7):
        run.save_checkpoint(checkpoint(round_))
    there = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert there == [f"round-{r:05d}" for r in range(7 - KEEP, 7)]


def test_rounds_beyond_the_width_of_their_names(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    for round_ in range(99_997, 100_001):
        run.save_checkpoint(checkpoint(round_))
    assert run.last_checkpoint().round == 100_000
    assert len(list((run.path / "checkpoints").iterdir())) == KEEP


def test_a_round_may_be_saved_again(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.save_checkpoint(checkpoint(1))
    run.save_checkpoint(checkpoint(1, size=9))
    assert len(run.last_checkpoint().module["w"]) == 9


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"'r' has no checkpoint .*\(no round was finished\)"):
        run_dir(tmp_path).last_checkpoint()


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.save_checkpoint(checkpoint(1))
    part = run.path / "checkpoints" / ".round-00002.part"
    part.mkdir()
    (part / MODULE_FILE).write_bytes(b"half")
    assert run.last_checkpoint().round == 1
    run.save_checkpoint(checkpoint(2))
    assert not part.exists()
    assert_same(run.last_checkpoint(), checkpoint(2))


KILLED = """
import os, sys
from pathlib import Path
from fedsplit.federation.server.books import run_dir as rd
from tests.federation.test_run_dir import checkpoint
run = rd.RunDir(Path(sys.argv[1]))
run.save_checkpoint(checkpoint(1))
where, real = sys.argv[2], getattr(*{"flush": (rd, "_flush"), "rename": (Path, "replace")}[sys.argv[2]])
def die(*args):
    os._exit(9)
setattr(*{"flush": (rd, "_flush"), "rename": (Path, "replace")}[where], die)
run.save_checkpoint(checkpoint(2))
"""


@pytest.mark.parametrize("instant", ["flush", "rename"])
def test_a_process_killed_while_it_saves(instant: str, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run.path), instant], cwd=root, timeout=120, check=False
    )
    assert done.returncode == 9
    assert (run.path / "checkpoints" / ".round-00002.part").is_dir()
    assert_same(run.last_checkpoint(), checkpoint(1))


def damage_bytes(path: Path) -> None:
    data = bytearray((path / MODULE_FILE).read_bytes())
    data[-1] ^= 1
    (path / MODULE_FILE).write_bytes(bytes(data))


def swap_module(path: Path) -> None:
    shutil.copy(path.parent / "round-00001" / MODULE_FILE, path / MODULE_FILE)


def truncate(path: Path) -> None:
    os.truncate(path / MODULE_FILE, 10)


def empty_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("")


def odd_manifest(path: Path) -> None:
    (path / MANIFEST).write_text('["round"]')


def poor_manifest(path: Path) -> None:
    kept = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({"sha256": kept["sha256"]}))


def no_module(path: Path) -> None:
    (path / MODULE_FILE).unlink()


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def deep_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[" * 100_000)


def other_state(path: Path) -> None:
    kept = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(kept | {"state": []}))


def _module_of(path: Path, module: dict[str, np.ndarray]) -> None:
    """Another module with its right digest: whole on the disk, and yet none that a run leaves."""
    save_file(module, path / MODULE_FILE)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["sha256"][MODULE_FILE] = hashlib.sha256((path / MODULE_FILE).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


def not_finite(path: Path) -> None:
    _module_of(path, checkpoint(2).module | {"w": np.full(4, np.nan, "f4")})


def double(path: Path) -> None:
    _module_of(path, checkpoint(2).module | {"w": np.zeros(4)})


def another_shape(path: Path) -> None:
    _module_of(path, checkpoint(2).module | {"w": np.zeros((4, 1), "f4")})


def another_name(path: Path) -> None:
    _module_of(path, checkpoint(2).module | {"x": np.zeros(4, "f4")})


DAMAGES = [damage_bytes, swap_module, truncate, empty_manifest, odd_manifest, poor_manifest]
DAMAGES += [no_module, empty, deep_manifest, other_state, not_finite, double, another_shape]
DAMAGES += [another_name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: object, tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.save_checkpoint(checkpoint(1))
    run.save_checkpoint(checkpoint(2))
    damage(folder(run, 2))  # type: ignore[operator]
    shapes = {"w": (4,), "b": (1, 2)}
    assert_same(run.last_checkpoint(shapes), checkpoint(1))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_others_cannot_read_a_run(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = run_dir(tmp_path / "runs").path
        known_nodes.write(path.parent, {"line-a": 7})
        private = (path.parent, path, path.parent / known_nodes.FILE)
        assert {place.stat().st_mode & 0o077 for place in private} == {0}
    finally:
        os.umask(old)


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    for round_ in (1, 2):
        run.save_checkpoint(checkpoint(round_))
        damage_bytes(folder(run, round_))
    with pytest.raises(RunDirError, match=r"damaged: round-00002: .*sha256.*; round-00001: "):
        run.last_checkpoint()


# The trained module.


def test_the_module_is_replaced_whole(tmp_path: Path) -> None:
    run = run_dir(tmp_path)
    run.save_module(lambda folder: (folder / "old.txt").write_text("x") and None)

    def fails(folder: Path) -> None:
        (folder / "new.txt").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunDirError, match=NO_SPACE):
        run.save_module(fails)
    assert [p.name for p in (run.path / "module").iterdir()] == ["old.txt"]
    assert not list(run.path.glob(".*"))
    run.save_module(lambda folder: (folder / "new.txt").write_text("y") and None)
    assert [p.name for p in (run.path / "module").iterdir()] == ["new.txt"]


# A full disk.


@pytest.fixture(name="small_disk")
def a_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    with small_disk(tmp_path / "disk", "size=256k") as where:
        yield where


def fill(disk: Path, leave: int = 0) -> None:
    """Take all room but `leave` bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    os.truncate(ballast, ballast.stat().st_size - leave)


NO_SPACE = r"(?i)cannot be written: .*no space left on device.*; free some space"


@pytest.mark.parametrize("leave", [0, 16_384])
def test_a_full_disk_keeps_the_last_checkpoint(leave: int, small_disk: Path) -> None:
    run = run_dir(small_disk)
    run.save_checkpoint(checkpoint(1))
    run.add_metrics(metrics(1))
    fill(small_disk, leave)
    with pytest.raises(RunDirError, match=NO_SPACE):
        run.save_checkpoint(checkpoint(2, size=20_000))
    assert_same(run.last_checkpoint(), checkpoint(1))
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-00001"]
    # With room again the run goes on.
    (small_disk / "ballast").unlink()
    run.save_checkpoint(checkpoint(2))
    assert run.last_checkpoint().round == 2


def test_a_full_disk_keeps_the_old_files_whole(small_disk: Path) -> None:
    run = run_dir(small_disk)
    run.write_json("summary.json", {"good": True})
    run.add_metrics(metrics(1))
    fill(small_disk)
    with pytest.raises(RunDirError, match=NO_SPACE):
        run.write_json("summary.json", {"much": "x" * 100_000})
    assert json.loads((run.path / "summary.json").read_text()) == {"good": True}
    assert not list(run.path.glob(".*"))
    long = metrics(2).model_copy(update={"site": "x" * 9000})
    with pytest.raises(RunDirError, match=NO_SPACE):
        run.add_metrics(long)
    assert run.read_metrics() == [metrics(1)]
    with pytest.raises(RunDirError, match=NO_SPACE):
        RunDir.create(small_disk, "other", task="t").write_json("config.json", {"x": "y" * 9000})


def test_what_a_stopped_writer_left_can_be_cleared(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.write_json("config.json", {"config": {}})
    (tmp_path / ".module.part").mkdir()
    (tmp_path / ".module.part" / "half").write_text("x")
    (tmp_path / ".status.json.part").write_text("{")
    folder.clear_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
