"""The benchmarks' arithmetic, their register, and each of them at its smallest. Nothing is timed here."""

from __future__ import annotations

import ast
import json
import multiprocessing
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import paired, wire_overhead
from benchmarks.echo_app import write_app
from benchmarks.registry import APART, BENCHMARKS, Benchmark, Target

RESULT = {
    "name": "x",
    "value": 3.0,
    "unit": "steps/s",
    "compared_with": "a rival",
    "ratio": 0.5,
    "pairs": [{"ratio": 0.4}, {"ratio": 0.5}, {"ratio": 0.9}],
    "what": "tiny",
}


def test_interleave_drops_the_warm_up_and_turns_the_order_round() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    rounds = paired.interleave(
        {"a": lambda: measure("a"), "b": lambda: measure("b")}, rounds=3, warmup=1
    )
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert rounds == [{"a": 3.0, "b": 4.0}, {"a": 6.0, "b": 5.0}, {"a": 7.0, "b": 8.0}]


def test_ratio_is_taken_within_a_round() -> None:
    rounds = paired.with_ratio([{"a": 1.0, "b": 2.0}, {"a": 30.0, "b": 10.0}], "a", "b")
    assert [one["ratio"] for one in rounds] == [0.5, 3.0]
    assert paired.median(rounds, "ratio") == 1.75
    assert paired.ratio_spread(RESULT) == {"min": 0.4, "median": 0.5, "max": 0.9}
    assert paired.ratio_spread({"ratio": 2.0, "pairs": [{"up": 1.0}]})["max"] == 2.0


def test_targets() -> None:
    assert Target(bound=0.9).met(0.9)
    assert not Target(bound=0.9).met(0.89)
    assert Target(bound=0.5, at_least=False).met(0.5)
    assert not Target(bound=0.5, at_least=False).met(0.51)
    assert str(Target(bound=0.5, at_least=False)) == "<= 0.5"


def test_every_module_with_a_run_is_known() -> None:
    folder = Path(command.__file__).parent
    with_run = {
        f"benchmarks.{file.stem}"
        for file in folder.glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    }
    assert with_run == {benchmark.module for benchmark in BENCHMARKS} | set(APART)


def test_command_writes_a_result_and_says_what_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake(Benchmark):
        def run(self, progress: paired.Progress) -> dict[str, Any]:
            progress("1/1")
            if self.name == "broken":
                raise RuntimeError("no luck")
            return dict(RESULT)

    chosen = [Fake(name="x", wanted=Target(bound=0.9)), Fake(name="broken", wanted=Target(bound=1))]
    out = StringIO()
    assert not command.run_all(list(chosen), tmp_path, Console(file=out, width=200))
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert written["met"] is False
    assert written["wanted"] == ">= 0.9"
    assert (written["min"], written["median"], written["max"]) == (0.4, 0.5, 0.9)
    assert {"machine", "command", "date", "what", "pairs"} <= written.keys()
    assert "MISSED" in out.getvalue()
    assert "no luck" in out.getvalue()
    assert not (tmp_path / "broken.json").exists()


def test_command_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["split-steps"])
    assert "split-step, device-rss" in capsys.readouterr().err


def test_echo_app_is_python_and_knows_its_settings(tmp_path: Path) -> None:
    write_app(tmp_path / "app", folder=tmp_path, nodes=2, rounds=3, shape=(1, 2))
    for file in (tmp_path / "app" / "echo").glob("*.py"):
        compile(file.read_text(encoding="utf-8"), str(file), "exec")
    assert '"rounds": 3' in (tmp_path / "app" / "echo" / "server.py").read_text(encoding="utf-8")


def test_wire_overhead_at_its_smallest() -> None:
    assert wire_overhead.run()["ratio"] > 1


def test_backbone_parts_counts_what_a_store_holds(tiny: dict[str, Path], tmp_path: Path) -> None:
    from benchmarks import backbone_parts
    from fedsplit.core.cut import Cut
    from fedsplit.model.backbone import Backbone
    from fedsplit.model.store import BackboneStore
    from tests.model.stores import fill

    store = BackboneStore(tmp_path)
    fill(store, tiny["vit"], Cut(1, 3))
    held = sum(f.stat().st_size for f in (tmp_path / "tensors").iterdir())
    assert backbone_parts.stored(Backbone.find(str(tiny["vit"])), Cut(1, 3)) == held


@pytest.mark.slow
def test_split_step_at_its_smallest_does_the_same_work_on_both_sides(tiny: dict[str, Path]) -> None:
    from benchmarks import split_step
    from fedsplit.core.cut import Cut

    result = split_step.run(pairs=1, steps=1, batch=2, cut=Cut(1, 3), backbone=tiny["vit"])
    assert result["losses_equal"]
    assert len(result["pairs"]) == 1


@pytest.mark.slow
def test_device_rss_at_its_smallest(tiny: dict[str, Path]) -> None:
    from benchmarks import device_rss

    cuts = ("0,4", f"2,2{device_rss.FORWARDS}")
    result = device_rss.run(repetitions=1, steps=1, batch=2, backbone=tiny["vit"], cuts=cuts)
    assert set(result["extra"]) == {"baseline", "whole", *cuts}
    assert not multiprocessing.active_children()


def test_rss_images_are_the_same_each_time() -> None:
    from benchmarks import rss_1000_sites

    def read() -> tuple[bytes, bytes]:
        with rss_1000_sites.images(30) as folder, np.load(folder / "images.npz") as arrays:
            return arrays["x"].tobytes(), arrays["y"].tobytes()

    assert read() == read()


def test_messages_share_the_streams_encoder() -> None:
    from benchmarks import stream_vs_messages

    with stream_vs_messages.stream_rate(2) as rate:
        assert rate() > 0
    assert not multiprocessing.active_children()


def test_load_once_counts_only_what_trained_the_same() -> None:
    from flwr.app import Message, RecordDict

    from benchmarks import load_once
    from benchmarks.supernode import asking
    from fedsplit.core.errors import FederationError
    from fedsplit.federation.messages import to_arrays

    def reply(values: list[float]) -> Message:
        content = RecordDict({"delta": to_arrays({"w": np.array(values, np.float32)})})
        return Message(content, reply_to=asking(RecordDict({})))

    load_once._same(reply([1.0, 2.0]), reply([1.0, 2.0]))
    for other in ([1.0, 2.0000002], [1.0]):
        with pytest.raises(FederationError, match="have not trained the same"):
            load_once._same(reply([1.0, 2.0]), reply(other))
