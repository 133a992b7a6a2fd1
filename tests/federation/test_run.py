"""A whole run in this process: what it learns, what it leaves behind, and how it bears what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fedsplit.core.errors import BackboneError, ConfigError, FederationError, RunDirError
from fedsplit.core.orders import DELTA, Answer
from fedsplit.core.records import Summary
from fedsplit.core.versions import CODE, installed
from fedsplit.federation import messages
from fedsplit.federation.server.books.run_dir import RunDir
from fedsplit.federation.server.run import Run, settle
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from tests.federation.conftest import prepared, settings, simulated


def adapter(run: Run | Path) -> dict[str, np.ndarray]:
    path = run.dir.path if isinstance(run, Run) else run
    return load_file(path / "module" / "adapter_model.safetensors")


def train_reply(
    change: Callable[[dict[str, Any], Answer], tuple[dict[str, Any], Answer]], node: int
):
    """A tamper that changes what `node` says after training."""

    def tamper(at: int, message: Message, reply: Message) -> Message:
        if at != node or DELTA not in reply.content.array_records:
            return reply
        record = reply.content.array_records[DELTA]
        delta = {name: array.numpy() for name, array in record.items()}
        answer = messages.read(reply.content, messages.ANSWER, Answer)
        delta, answer = change(delta, answer)
        content = messages.write(messages.ANSWER, answer)
        content[DELTA] = messages.to_arrays(delta)
        return Message(content, reply_to=message)

    return tamper


def test_mixed_cuts_train_one_module(tmp_path: Path) -> None:
    config = settings(tmp_path, cut="0,6;1,5;2,4;6,6", max_samples=320, compare_local_only=True)
    with prepared(config, simulated(4)) as (run, net):
        summary = run.go()
    assert summary.outcome == "complete"
    assert [s.cut for s in summary.sites] == ["0,6", "1,5", "2,4", "6,6"]
    assert summary.accuracy_global_start is not None
    assert summary.accuracy_global is not None
    assert summary.accuracy_global > summary.accuracy_global_start + 0.3
    assert len(summary.accuracy_by_round) == 3
    assert summary.accuracy_local_only is not None
    # One message a site: roll call, local-only, two rounds, the last evaluation.
    assert len(net.sent) == 4 * 5
    by_site = {s.name: s for s in summary.sites}
    full = [m for m in run.ledger.metrics if m.site == "site-3"]
    assert by_site["site-3"].bytes_up > 0
    assert all(m.bytes_activation_up == m.bytes_activation_down == 0 for m in full)
    thin = [m for m in run.ledger.metrics if m.site == "site-0"]
    # Pooled downlink: d floats a sample come down, all tokens go up.
    assert all(10 * m.bytes_activation_down < m.bytes_activation_up for m in thin)
    saved = adapter(run)
    moved = {n for n, t in saved.items() if ".lora_B." in n and np.any(t)}
    assert len(moved) == 12  # site-3 trained all six blocks, query and value


def test_run_directory_holds_what_the_design_says(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with prepared(config, simulated(2)) as (run, _):
        run.go()
    path = run.dir.path
    saved = json.loads((path / "config.json").read_text())
    assert saved["config"] == config.flat()
    assert saved["classes"] == list("0123456789")
    assert saved["backbone_sha256"] == Backbone.find("vit-glyphs").sha256
    assert "torch" in saved["versions"]
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 3
    summary = Summary.model_validate_json((path / "summary.json").read_text())
    assert summary.rounds_done == 2
    assert json.loads((path / "status.json").read_text())["phase"] == "done"
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"round-00001", "round-00002"}
    assert (path / "module" / "adapter_config.json").is_file()


def test_same_seed_same_module_and_another_seed_not(tmp_path: Path) -> None:
    modules = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = settings(tmp_path, run_name=name, seed=seed, rounds=1)
        with prepared(config, simulated(2)) as (run, _):
            run.go()
        modules.append(adapter(run))
    first, again, other = modules
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert any(not np.array_equal(first[n], other[n]) for n in first)


def test_resumed_run_equals_the_undisturbed_one(tmp_path: Path) -> None:
    with prepared(settings(tmp_path, run_name="whole", rounds=3), simulated(2)) as (run, _):
        whole = run.go()

    def lost(node: int, message: Message) -> bool:
        return message.metadata.group_id == "2" and node == 1

    broken = settings(tmp_path, run_name="broken", rounds=3, deadline_s=8.0)
    with (
        prepared(broken, simulated(2), silent=lost) as (run, _),
        pytest.raises(FederationError, match=r"min-sites=2.*no answer within.*resume=broken"),
    ):
        run.go()
    status = json.loads((tmp_path / "broken" / "status.json").read_text())
    assert status["phase"] == "failed"
    assert json.loads((tmp_path / "broken" / "summary.json").read_text())["rounds_done"] == 1

    resumed = settle(settings(tmp_path, run_name="", rounds=9, resume="broken"))
    assert resumed.train.rounds == 3
    with prepared(resumed, simulated(2)) as (run, _):
        summary = run.go()
    assert summary.rounds_done == 3
    assert summary.accuracy_by_round == whole.accuracy_by_round
    before, after = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(np.array_equal(before[n], after[n]) for n in before)


def test_resuming_before_the_first_round_starts_again(tmp_path: Path) -> None:
    def lost(node: int, message: Message) -> bool:
        return message.metadata.group_id == "1" and node == 1

    broken = settings(tmp_path, rounds=1, deadline_s=8.0)
    with (
        prepared(broken, simulated(2), silent=lost) as (run, _),
        pytest.raises(FederationError, match=r"no round was finished, resume=run starts it again"),
    ):
        run.go()
    with prepared(settle(settings(tmp_path, run_name="", resume="run")), simulated(2)) as (run, _):
        assert run.go().outcome == "complete"
    assert len(run.dir.read_metrics()) == 2 * 2


BAD = {
    "NaN": lambda d, a: ({n: t * np.float32("nan") for n, t in d.items()}, a),
    "float64": lambda d, a: ({n: t.astype(np.float64) for n, t in d.items()}, a),
    "shape": lambda d, a: ({n: t[:1] for n, t in d.items()}, a),
    "missing": lambda d, a: (dict(list(d.items())[1:]), a),
    "nobody asked for": lambda d, a: (d | {"vit.layers.9.weight": np.zeros(3, np.float32)}, a),
    "moves by more": lambda d, a: ({n: t + np.float32(1e9) for n, t in d.items()}, a),
    "samples": lambda d, a: (
        d,
        Answer(metrics=a.metrics.model_copy(update={"samples": 10**9})),
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_update_is_refused_by_name_and_the_round_goes_on(kind: str, tmp_path: Path) -> None:
    config = settings(tmp_path, rounds=1, min_sites=1, cut="0,6", max_samples=80)
    with prepared(config, simulated(2), tamper=train_reply(BAD[kind], node=1)) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    (left,) = summary.left_out
    assert left.site == "site-0"
    assert left.rounds == (1,)
    assert kind in left.reason
    assert all(np.isfinite(t).all() for t in adapter(run).values())
    # The module is what the good site alone made of it.
    alone = settings(tmp_path, run_name="alone", rounds=1, min_sites=1, cut="0,6", max_samples=80)
    silent = {"silent": lambda node, m: node == 1 and m.metadata.group_id == "1"}
    with prepared(alone.changed(deadline_s=3.0), simulated(2), **silent) as (
        other,
        _,
    ):
        other.go()
    good = adapter(other)
    assert all(np.array_equal(good[n], t) for n, t in adapter(run).items())


def test_a_lying_reply_is_left_out(tmp_path: Path) -> None:
    def wrong_name(delta: Any, answer: Answer) -> Any:
        return delta, Answer(metrics=answer.metrics.model_copy(update={"site": "site-1"}))

    config = settings(tmp_path, rounds=1, min_sites=1)
    with prepared(config, simulated(2), tamper=train_reply(wrong_name, node=1)) as (run, _):
        summary = run.go()
    assert summary.left_out[0].site == "site-0"
    assert "answered for" in summary.left_out[0].reason


def test_site_that_crashes_is_named(tmp_path: Path) -> None:
    nodes = simulated(2)
    nodes.append({"data": f"folder:{tmp_path / 'nowhere'}", "site": "line-3"})
    with prepared(settings(tmp_path, rounds=1), nodes) as (run, _):
        summary = run.go()
    assert summary.outcome == "partial"
    (left,) = summary.left_out
    assert "line-3" in left.reason
    assert "nowhere" in left.reason


def test_two_sites_of_one_name(tmp_path: Path) -> None:
    nodes = [
        {"partition-id": 0, "num-partitions": 2, "site": "line"},
        {"partition-id": 1, "num-partitions": 2, "site": "line"},
    ]
    with (
        prepared(settings(tmp_path), nodes) as (run, _),
        pytest.raises(FederationError, match="another site is called 'line' too"),
    ):
        run.go()


def test_too_few_nodes_in_simulation_says_how_to_get_more(tmp_path: Path) -> None:
    config = settings(tmp_path, sites=3)
    with (
        prepared(config, simulated(2)) as (run, _),
        pytest.raises(FederationError, match="num-supernodes=3"),
    ):
        run.go()


def test_sites_own_cut_wins_and_is_checked(tmp_path: Path) -> None:
    nodes = [n | {"cut": c} for n, c in zip(simulated(2), ("2,4", "6,6"), strict=True)]
    with prepared(settings(tmp_path, rounds=1), nodes) as (run, _):
        summary = run.go()
    assert [s.cut for s in summary.sites] == ["2,4", "6,6"]
    nodes[0]["cut"] = "2,7"
    with (
        prepared(settings(tmp_path, run_name="x"), nodes) as (run, _),
        pytest.raises(FederationError, match="cut 2,7 does not fit the backbone: it has 6 blocks"),
    ):
        run.go()


def test_other_backbone_files_at_a_site_are_refused(tmp_path: Path) -> None:
    def other_digest(node: int, message: Message) -> bool:
        if node == 1:
            record = message.content.config_records[messages.ORDER]
            text = str(record["json"])
            digest = json.loads(text)["backbone_sha256"]
            record["json"] = text.replace(digest, "0" * 64)
        return False

    with (
        prepared(settings(tmp_path), simulated(2), silent=other_digest) as (run, _),
        pytest.raises(FederationError, match=r"has digest .* the server's has 000000000000"),
    ):
        run.go()


def test_other_fedsplit_version_is_refused_whatever_its_orders_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer_order(node: int, message: Message) -> bool:
        record = message.content.config_records[messages.ORDER]
        record["json"] = json.dumps(json.loads(str(record["json"])) | {"not-known-here": 1})
        return False

    monkeypatch.setattr("fedsplit.federation.messages.__version__", "9.9.9")
    with (
        prepared(settings(tmp_path), simulated(2), silent=newer_order) as (run, _),
        pytest.raises(FederationError, match=r"the server runs fedsplit .*, this site 9\.9\.9"),
    ):
        run.go()


def test_a_site_that_answers_of_another_version_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsplit.site.runtime.__version__", "9.9.9")
    with (
        prepared(settings(tmp_path), simulated(2)) as (run, _),
        pytest.raises(FederationError, match=r"it runs fedsplit 9\.9\.9, the server"),
    ):
        run.go()


def test_other_libraries_at_a_site_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = installed() | {"torch": "2.6.0", CODE: "0" * 12}
    monkeypatch.setattr("fedsplit.site.runtime.installed", lambda: theirs)
    with prepared(settings(tmp_path, rounds=1), simulated(2)) as (run, _):
        summary = run.go()
    assert summary.outcome == "complete"
    for site in summary.sites:
        assert f"torch 2.6.0 here, {installed()['torch']} at the server" in site.notes
        assert any(note.startswith("fedsplit's code 000000000000 here") for note in site.notes)


def test_cut_beyond_the_backbone(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="it has 6 blocks"),
        prepared(settings(tmp_path, cut="2,10"), simulated(2)),
    ):
        pass


def test_unknown_backbone(tmp_path: Path) -> None:
    with (
        pytest.raises(BackboneError, match="not a directory"),
        prepared(settings(tmp_path, backbone=str(tmp_path / "none")), simulated(2)),
    ):
        pass


def test_run_name_is_taken_once(tmp_path: Path) -> None:
    RunDir.create(tmp_path, "run", task="t").write_json("config.json", {})
    with pytest.raises(RunDirError, match="already"), prepared(settings(tmp_path), simulated(2)):
        pass


@pytest.mark.parametrize("training", ["head+tail", "tail"])
def test_frozen_head_sends_no_gradient(training: str, tmp_path: Path) -> None:
    config = settings(tmp_path, rounds=1, cut="2,4", device_training=training)
    with prepared(config, simulated(2)) as (run, _):
        run.go()
    steps = [m for m in run.ledger.metrics if m.round == 1]
    up_to_down = [m.bytes_activation_up / m.bytes_activation_down for m in steps]
    assert all(0.9 < ratio < 1.1 for ratio in up_to_down)
    lora_b = {n for n, t in adapter(run).items() if ".lora_B." in n and np.any(t)}
    head = {n for n in lora_b if ".layers.0." in n or ".layers.1." in n}
    assert bool(head) == (training == "head+tail")
    expected = module.trained_names(
        run.backbone, run._strategy.spec, config.placement.cuts[0], head=training == "head+tail"
    )
    assert {n.removeprefix("base_model.model.") for n in lora_b} == {
        n for n in expected if ".lora_B." in n
    }


def test_without_a_split_a_frozen_head_is_no_head(tmp_path: Path) -> None:
    config = settings(
        tmp_path, rounds=1, cut="6,6", device_training="tail", max_samples=80, batch_size=8
    )
    with prepared(config, simulated(2)) as (run, _):
        run.go()
    assert len({n for n, t in adapter(run).items() if ".lora_B." in n and np.any(t)}) == 12


def test_classifier_alone(tmp_path: Path) -> None:
    config = settings(
        tmp_path, module="classifier", cut="0,6;6,6", max_samples=320, learning_rate=0.02
    )
    with prepared(config, simulated(2)) as (run, _):
        summary = run.go()
    assert summary.accuracy_global > 0.5
    assert not any(".lora_B." in n and np.any(t) for n, t in adapter(run).items())
