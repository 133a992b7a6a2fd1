"""Runs of a federation in its audit log: how each ended, with which sites, and the module that came of it."""

from __future__ import annotations

from typing import Any

import pytest

from fedsplit.core.errors import FederationError, FolderError
from fedsplit.core.records import TasksSummary
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.run_audit import audited
from fedsplit.registry.module_files import module_digest
from tests.report.samples import metrics, summary


def lines(folder: FederationFolder) -> list[dict[str, Any]]:
    return [line for line in audit.read(folder) if line["what"] == "run-ended"]


def test_the_end_names_sites_and_module(folder: FederationFolder) -> None:
    module = folder.runs / "night" / "module"
    module.mkdir(parents=True)
    (module / "adapter_model.safetensors").write_bytes(b"tensors")
    ended = summary(metrics(sites=2, rounds=1), run="night", outcome="complete", module="module")
    with audited(folder, "night", folder.runs / "night", pytest.fail) as told:
        told(ended)
    (line,) = lines(folder)
    assert (line["run"], line["outcome"]) == ("night", "complete")
    assert line["sites"] == [site.name for site in ended.sites]
    assert line["module_sha256"] == module_digest(module)
    assert [e["what"] for e in audit.read(folder)] == ["run-started", "run-ended"]


def test_each_task_has_its_end(folder: FederationFolder) -> None:
    tasks = tuple(
        summary(metrics(sites=2, rounds=1), task=t, outcome=o)
        for t, o in (("a", "complete"), ("b", "failed"))
    )
    with audited(folder, "night", folder.runs / "night", pytest.fail) as told:
        told(TasksSummary(run="night", tasks=tasks))
    assert [(e["task"], e["outcome"]) for e in lines(folder)] == [
        ("a", "complete"),
        ("b", "failed"),
    ]


def test_a_run_that_fails_or_is_stopped_is_recorded(folder: FederationFolder) -> None:
    for error in (FederationError("too few sites"), KeyboardInterrupt()):
        with (
            pytest.raises(type(error)),
            audited(folder, "night", folder.runs / "night", pytest.fail),
        ):
            raise error
    assert [e["reason"] for e in lines(folder)] == ["too few sites", "KeyboardInterrupt"]


def test_a_disk_that_is_full_at_the_end_is_said_and_at_the_start_stops_the_run(
    folder: FederationFolder,
) -> None:
    said: list[str] = []
    with audited(folder, "night", folder.runs / "night", said.append) as told:
        told(summary(metrics(sites=2, rounds=1)))
        folder.audit.unlink()
        folder.audit.mkdir()
    assert "not in the audit log" in said[0]
    with pytest.raises(FolderError), audited(folder, "night", folder.runs, said.append):
        pytest.fail("it must not start")
