"""The records of a run: JSON there and back, strict about names, frozen."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from fedsplit.core.encoder import Capabilities, Grant
from fedsplit.core.records import RoundMetrics, Status, Summary

METRICS = {
    "round": 1,
    "site": "press-3",
    "cut": "1,5",
    "codec": "fp32",
    "samples": 10,
    "test_samples": 4,
    "correct_global": 2,
    "correct_personal": None,
    "loss": None,
    "bytes_activation_up": 1,
    "bytes_activation_down": 2,
    "bytes_module_up": 3,
    "bytes_module_down": 4,
    "steps": 5,
    "seconds_device": 0.5,
    "seconds_wait": 0.25,
    "peak_rss_bytes": 6,
}
# Reports, the CLI and users' scripts read them.
SUMMARY_KEYS = {
    "run", "method", "backbone", "backbone_sha256", "rounds_done", "sites", "accuracy_global",
    "accuracy_global_start", "accuracy_local_only", "bytes_activation", "bytes_module",
    "bytes_full_model", "wall_s", "outcome", "left_out",
}  # fmt: skip
SITE_KEYS = {
    "name", "cut", "samples", "accuracy_before", "accuracy", "bytes_up", "bytes_down",
    "seconds_device", "seconds_wait", "peak_rss_bytes", "rounds_missed",
}  # fmt: skip


def test_json_round_trip() -> None:
    metrics = RoundMetrics.model_validate(METRICS)
    again = RoundMetrics.model_validate_json(metrics.model_dump_json())
    assert again == metrics
    assert json.loads(metrics.model_dump_json()) == METRICS | {
        "flops_device": 0, "process": "", "backbone_loads": 0,
    }  # fmt: skip


def test_a_metrics_record_is_one_line() -> None:
    metrics = RoundMetrics.model_validate(METRICS | {"site": 'press"3 検'})
    assert "\n" not in metrics.model_dump_json()


@pytest.mark.parametrize("change", [{"extra": 1}, {"round": "x"}, {"loss": "low"}, {"site": None}])
def test_strict_about_names_and_types(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RoundMetrics.model_validate(METRICS | change)
    with pytest.raises(ValidationError, match="Field required"):
        RoundMetrics.model_validate({"round": 1})


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RoundMetrics.model_validate(METRICS).round = 2  # type: ignore[misc]


def test_the_summary_holds_what_the_design_promises() -> None:
    assert set(Summary.model_fields) >= SUMMARY_KEYS
    site = Summary.model_json_schema()["$defs"]["SiteSummary"]["properties"]
    assert set(site) >= SITE_KEYS
    outcomes = Summary.model_json_schema()["properties"]["outcome"]["enum"]
    assert outcomes == ["complete", "partial", "failed"]


def test_status_starts_without_words() -> None:
    status = Status(phase="waiting", round=0, rounds=2, sites=(), replied=())
    assert status.message == ""


GRANT = {
    "run": "r", "site": "s", "task": "t", "round": 1, "a": 1, "b": 3, "version": "r/1",
    "backbone_sha256": "0" * 64, "fedsplit_version": "0.1.0", "max_batch": 1, "max_tokens": 1,
    "max_steps": 1,
}  # fmt: skip


def test_a_grant_reads_its_cut() -> None:
    assert str(Grant.model_validate(GRANT).cut) == "1,3"


@pytest.mark.parametrize(
    "change",
    [
        {"run": ""},
        {"site": "s" * 129},
        {"round": -1},
        {"a": -1},
        {"backbone_sha256": "0" * 63},
        {"backbone_sha256": "G" * 64},
        {"backbone_sha256": "0" * 64 + "\n"},
        {"max_batch": 0},
        {"admin": True},
    ],
)
def test_a_grant_is_strict(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Grant.model_validate(GRANT | change)


def test_capabilities_round_trip() -> None:
    offer = Capabilities(
        fedsplit_version="0.1.0",
        backbone="b",
        backbone_sha256="0" * 64,
        blocks=4,
        width=24,
        pooled_width=24,
        versions=("r/1",),
    )
    assert Capabilities.model_validate_json(offer.model_dump_json()) == offer
