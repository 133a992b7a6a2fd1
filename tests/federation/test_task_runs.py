"""Several tasks in one run: each learns what it would have learnt alone, and none pays for another's failure."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, FederationError
from fedsplit.core.records import Status, TasksSummary
from fedsplit.experiment.check import fits
from fedsplit.federation import messages
from fedsplit.federation.server.endpoint import Endpoint
from fedsplit.federation.server.run import settle
from fedsplit.federation.server.task_runs import TaskRuns
from fedsplit.training.site_settings import SiteSettings
from fedsplit.trunk.host import MAX_VERSIONS
from fedsplit.trunk.process import hosting
from tests.federation.conftest import prepared, settings, simulated
from tests.federation.grid import InProcessGrid

HOLDERS = "digits:0-2;bars:1-3"


@pytest.fixture
def bars(tmp_path: Path) -> str:
    """96 images of another kind: a bright bar that lies, stands or leans, in noise."""
    rng = np.random.default_rng(5)
    names = np.array(["lies", "stands", "leans"])
    labels = np.arange(96) % 3
    images = rng.integers(0, 90, (96, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        at = int(rng.integers(1, 7))
        if label == 0:
            image[at] = 250
        elif label == 1:
            image[:, at] = 250
        else:
            np.fill_diagonal(image, 250)
    path = tmp_path / "bars.npz"
    np.savez(path, x=images, y=labels, classes=names)
    return f"npz:{path}"


def two(runs: Path, bars: str, **other: Any) -> RunConfig:
    """Digits at sites 0 to 2, bars at 1 to 3."""
    tasks = {"tasks": f"digits=digits;bars={bars}", "task_holders": HOLDERS, "max_samples": 90}
    return settings(runs, **(tasks | other))


@contextmanager
def several(
    config: RunConfig, nodes: list[dict[str, Any]], **grid: Any
) -> Iterator[tuple[TaskRuns, InProcessGrid]]:
    with hosting(config, None) as (server, host, key):
        endpoint = Endpoint(
            server.address, key, tls=False, ca_file="", publish=host.publish, collect=host.collect
        )
        net = InProcessGrid(nodes, workers=1, **grid)
        try:
            yield TaskRuns(net, config, endpoint, simulated=True), net
        finally:
            net.close()
            assert server.stats().live_sessions == 0


def module_in(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "module" / "adapter_model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = module_in(one), module_in(other)
    return first.keys() == second.keys() and all(np.array_equal(first[n], second[n]) for n in first)


def task_of(message: Message) -> str:
    text = str(message.content.config_records[messages.ORDER]["json"])
    return str(json.loads(text)["config"]["task"])


def alone(runs: Path, task: str, source: str, sites: list[int], **other: Any) -> Path:
    """The folder of a plain run of one task over the sites that hold it: it knows nothing of tasks."""
    nodes = [n | {"site": f"site-{i}"} for n, i in zip(simulated(len(sites)), sites, strict=True)]
    config = settings(runs, run_name=f"alone-{task}", task=task, data=source, **other)
    with prepared(config, nodes, workers=1) as (run, _):
        run.go()
    return run.dir.path


def test_each_task_learns_what_it_would_have_learnt_alone(tmp_path: Path, bars: str) -> None:
    many = {"rounds": 2, "max_samples": 160}
    since = time.monotonic()
    with several(two(tmp_path, bars, **many), simulated(4)) as (runs, net):
        ended = runs.go()
    assert ended.outcome == "complete"
    assert [t.task for t in ended.tasks] == ["digits", "bars"]
    assert [[s.name for s in t.sites] for t in ended.tasks] == [
        ["site-0", "site-1", "site-2"],
        ["site-1", "site-2", "site-3"],
    ]
    for task in ended.tasks:
        assert task.accuracy_global is not None
        assert task.accuracy_global_start is not None
        assert task.accuracy_global > task.accuracy_global_start + 0.2
        assert not task.left_out
    # They took turns: a round of the one, then a round of the other.
    order = [task_of(m) for m in net.sent]
    turns = [name for i, name in enumerate(order) if i == 0 or name != order[i - 1]]
    assert turns == ["digits", "bars"] * 4

    top = tmp_path / "run"
    assert equal(top / "digits", alone(tmp_path, "digits", "digits", [0, 1, 2], **many))
    assert equal(top / "bars", alone(tmp_path, "bars", bars, [1, 2, 3], **many))

    assert TasksSummary.model_validate_json((top / "tasks.json").read_text()) == ended
    status = Status.model_validate_json((top / "status.json").read_text())
    assert (status.phase, status.round) == ("done", 2)
    assert [t.run for t in ended.tasks] == ["run/digits", "run/bars"]
    classes = json.loads((top / "bars" / "config.json").read_text())["classes"]
    assert sorted(classes) == ["leans", "lies", "stands"]
    # Time is told to the task whose turn it was.
    assert sum(t.wall_s for t in ended.tasks) <= time.monotonic() - since


def test_a_task_that_fails_leaves_the_other_and_can_be_gone_on_with(
    tmp_path: Path, bars: str
) -> None:
    def lost(node: int, message: Message) -> bool:
        return message.metadata.group_id == "2" and node == 4 and task_of(message) == "bars"

    # Three sites hold it, and three are wanted.
    config = two(tmp_path, bars, min_sites=3, deadline_s=6.0)
    with (
        several(config, simulated(4), silent=lost) as (runs, _),
        pytest.raises(
            FederationError,
            match=r"1 of 2 tasks failed: bars: round 2 got 2 .*resume=run goes on with those alone",
        ),
    ):
        runs.go()
    top = tmp_path / "run"
    assert [p.name for p in runs.finished] == ["digits"]
    broken = TasksSummary.model_validate_json((top / "tasks.json").read_text())
    assert broken.outcome == "failed"
    assert [t.outcome for t in broken.tasks] == ["complete", "failed"]
    assert [t.rounds_done for t in broken.tasks] == [2, 1]
    assert json.loads((top / "status.json").read_text())["phase"] == "failed"
    digits = module_in(top / "digits")

    resumed = settle(settings(tmp_path, run_name="", resume="run"))
    with several(resumed, simulated(4)) as (runs, net):
        ended = runs.go()
    assert ended.outcome == "complete"
    # The one that was complete was not asked again.
    assert {task_of(m) for m in net.sent} == {"bars"}
    assert all(np.array_equal(t, digits[n]) for n, t in module_in(top / "digits").items())
    assert equal(top / "bars", alone(tmp_path, "bars", bars, [1, 2, 3], max_samples=90))


def test_a_run_that_was_stopped_goes_on_with_each_task_where_it_was(
    tmp_path: Path, bars: str
) -> None:
    class StoppedError(BaseException):
        pass

    def stop(node: int, message: Message) -> bool:
        # As Ctrl-C in the second round of the second task: the first one has two rounds by then.
        if message.metadata.group_id == "2" and task_of(message) == "bars":
            raise StoppedError
        return False

    with (
        several(two(tmp_path, bars), simulated(4), silent=stop) as (runs, _),
        pytest.raises(StoppedError),
    ):
        runs.go()
    top = tmp_path / "run"
    rounds = {
        name: max(p.name for p in (top / name / "checkpoints").iterdir())
        for name in ("digits", "bars")
    }
    assert rounds == {"digits": "round-00002", "bars": "round-00001"}
    assert not (top / "tasks.json").exists()

    with several(settle(settings(tmp_path, run_name="", resume="run")), simulated(4)) as (
        runs,
        net,
    ):
        ended = runs.go()
    assert ended.outcome == "complete"
    asked = {(task_of(m), m.metadata.group_id) for m in net.sent}
    assert asked == {("digits", "0"), ("digits", "3"), ("bars", "0"), ("bars", "2"), ("bars", "3")}
    assert equal(top / "digits", alone(tmp_path, "digits", "digits", [0, 1, 2], max_samples=90))
    assert equal(top / "bars", alone(tmp_path, "bars", bars, [1, 2, 3], max_samples=90))


def test_more_tasks_than_the_encoder_keeps_versions(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(MAX_VERSIONS + 2)]
    config = settings(
        tmp_path,
        tasks=";".join(f"{n}=digits" for n in names),
        max_samples=40,
        cut="1,5",
        rounds=1,
        encoder_training="hosted",
    )
    with several(config, simulated(2)) as (runs, _):
        ended = runs.go()
    assert ended.outcome == "complete"
    assert len(ended.tasks) == len(names)
    # What the encoder trained was collected for each: same settings, same module.
    top = tmp_path / "run"
    assert all(equal(top / "t0", top / name) for name in names[1:])


def test_what_a_site_keeps_for_itself_is_kept_for_each_task(tmp_path: Path) -> None:
    config = settings(
        tmp_path, tasks="one=digits;two=digits", method="ditto", max_samples=60, cut="0,6"
    )
    with several(config, simulated(2)) as (runs, _):
        runs.go()
    kept = [{p.name for p in (tmp_path / "run" / n / "sites").iterdir()} for n in ("one", "two")]
    assert all(len(names) == 2 for names in kept)
    assert not kept[0] & kept[1]


def test_sites_with_files_of_their_own(tmp_path: Path, bars: str) -> None:
    nodes = [
        {"site": "a", "tasks": f"digits=digits;bars={bars}"},
        {"site": "b", "tasks": f"bars={bars}"},
        {"site": "c", "tasks": "digits=digits"},
    ]
    config = two(tmp_path, "folder:nowhere", task_holders="", rounds=1)
    with several(config, nodes) as (runs, _):
        ended = runs.go()
    assert [[s.name for s in t.sites] for t in ended.tasks] == [["a", "c"], ["a", "b"]]


def test_a_task_that_nobody_holds(tmp_path: Path, bars: str) -> None:
    nodes = [{"site": name, "tasks": "digits=digits"} for name in "ab"]
    with (
        several(two(tmp_path, bars, rounds=1), nodes) as (runs, _),
        pytest.raises(
            FederationError, match="bars: none of the 2 sites holds task 'bars'; name it in task-"
        ),
    ):
        runs.go()
    assert [p.name for p in runs.finished] == ["digits"]


def test_too_few_that_hold_it_are_told_from_those_that_do_not(tmp_path: Path, bars: str) -> None:
    nodes = [{"site": name, "tasks": "digits=digits"} for name in "ab"] + [
        {"site": "c", "tasks": f"digits=digits;bars={bars}"}
    ]
    with (
        several(two(tmp_path, bars, rounds=1), nodes) as (runs, _),
        pytest.raises(
            FederationError,
            match=r"bars: 1 of 1 sites can take part, min-sites=2 are wanted \(2 more do not hold",
        ),
    ):
        runs.go()


def test_one_source_for_several_tasks_is_refused(tmp_path: Path, bars: str) -> None:
    config = two(tmp_path, bars)
    site = SiteSettings.from_node({"site": "a", "data": "digits"}, node_id=1)
    with pytest.raises(ConfigError, match="data=digits is one source and the run has several"):
        site.for_task(config.of_task("bars"))
    assert site.for_task(settings(tmp_path)) == site


def test_shares_are_dealt_among_the_holders(tmp_path: Path, bars: str) -> None:
    config = two(tmp_path, bars).of_task("bars")
    sites = [SiteSettings.from_node(node, node_id=i) for i, node in enumerate(simulated(4))]
    held = [site.for_task(config) for site in sites]
    assert [h and h.partition for h in held] == [None, (0, 3), (1, 3), (2, 3)]
    with pytest.raises(ConfigError, match="to site 3, the simulation's sites are numbered from 0"):
        SiteSettings.from_node(simulated(3)[0], node_id=1).for_task(config)


def test_a_grid_refuses_several_tasks(tmp_path: Path, bars: str) -> None:
    (fault,) = fits(two(tmp_path, bars, sites=4))
    assert "a run of a grid has one task" in fault


def test_cuts_that_do_not_fit_leave_no_folder(tmp_path: Path, bars: str) -> None:
    with (
        pytest.raises(ConfigError, match="it has 6 blocks"),
        several(two(tmp_path, bars, cut="2,10"), simulated(4)),
    ):
        pass
    assert not (tmp_path / "run").exists()
