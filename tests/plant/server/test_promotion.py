"""Promotion by measurement: the policy's verdicts, the run that measures, and what counts as drift."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from fedsplit.cli.main import call
from fedsplit.core.errors import BackboneError
from fedsplit.plant.server import audit, usage
from fedsplit.plant.server.folder import FederationFolder, PromotionSection
from fedsplit.plant.server.promotion import (
    Fleet,
    Measured,
    check_backbone,
    fleet,
    judge,
    run_settings,
)
from fedsplit.plant.server.registry import Registry
from fedsplit.plant.server.runs import last_module
from fedsplit.plant.server.tables import Site
from fedsplit.plant.wire import Answered, DayUsage, ModuleState, Report
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.registry.version import Facts

POLICY = PromotionSection()
MODULE = "ab" * 32


def measured(name: str, **sites: float) -> Measured:
    return Measured(name, "accuracy", {site: (score, 20) for site, score in sites.items()})


def test_a_loss_at_one_site_is_refused_by_name_and_points() -> None:
    old = measured("parts#1", a=0.90, b=0.95)
    assert judge(POLICY, measured("parts#2", a=0.99, b=0.94), old).refusals == ()
    verdict = judge(POLICY, measured("parts#2", a=0.99, b=0.925), old)
    assert verdict.refusals == (
        "site b loses 2.5 points: accuracy 0.925 with parts#2, 0.950 with parts#1 in production, on its 20 test samples; at "
        "most 1 may be lost",
    )
    assert verdict.measured["a"] == "parts#2 0.990, parts#1 0.900, accuracy, 20 test samples"
    # The first one has nothing to lose against.
    assert judge(POLICY, measured("parts#1", a=0.1), None).refusals == ()


def test_few_samples_and_sites_that_are_away_are_the_policys_affair() -> None:
    few = Measured("parts#2", "accuracy", {"a": (0.9, 4), "b": (0.9, 5)}, {"c": "it left"})
    strict = judge(POLICY, few, None, away=["d"])
    assert [r.split(";")[0] for r in strict.refusals] == [
        "site c is away (it left)",
        "site d is away (it does not report)",
        "site a has too few test samples: 4, at least 5 are wanted (min-samples in [promotion] of federation.toml)",
    ]
    mild = judge(PromotionSection(when_few="accept", when_away="accept"), few, None, away=["d"])
    assert mild.refusals == ()
    assert len(mild.notes) == 3
    nobody = judge(PromotionSection(when_away="accept"), Measured("x", "accuracy", {}), None)
    assert nobody.refusals == ("no site has measured it",)


def test_the_measuring_run_finds_what_the_module_reached_and_is_no_training(
    folder: FederationFolder, trained_image_module: Path, tmp_path: Path
) -> None:
    from tests.federation import conftest as federation

    said = run_settings(folder, trained_image_module / "module", "digits", ["site-0", "site-1"])
    assert (said["roster"], said["rounds"], said["registry"]) == ("site-0,site-1", 0, "none")
    by_name = {key.replace("-", "_"): value for key, value in said.items()}
    del by_name["roster"]
    by_name |= {"max_samples": 400, "cut": "1,5;6,6", "run_name": "measure-1"}
    config = federation.settings(folder.runs, **by_name)
    with federation.prepared(config, federation.simulated(2)) as (run, _):
        summary = run.go()
    found = Measured.of("digits#1", summary)
    trained = json.loads((trained_image_module / "summary.json").read_text())
    assert {s: score for s, (score, _) in found.sites.items()} == {
        site["name"]: site["accuracy"] for site in trained["sites"]
    }
    assert found.missing == {}
    # `run --from-last` never starts from what was only measured.
    assert last_module(folder, "digits") is None


def test_another_backbone_is_refused_before_anything_starts(folder: FederationFolder) -> None:
    with pytest.raises(BackboneError, match=r"parts#1 was trained on a backbone with digest abababababab, this federation's is"):  # fmt: skip
        check_backbone(folder, "parts#1", MODULE)


def test_the_command_measures_and_says_why_it_does_not_promote(
    folder: FederationFolder, trained_image_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ModuleRegistry.open(folder.modules, create=True) as registry:
        registry.add(trained_image_module / "module", Facts(task="digits"))
    command = ["module", "promote", "digits#1", "--federation", str(folder.path)]
    assert call(command) == 1
    told = capsys.readouterr().err
    assert "no site with data of task digits is up, so digits#1 cannot be measured" in told
    # By its own folder it is the same registry.
    assert call(["module", "promote", "digits#1", "--registry", str(folder.modules)]) == 1
    capsys.readouterr()
    with ModuleRegistry.open(folder.modules) as registry:
        assert registry.aliases() == {}
    with Registry(folder) as members:
        for name, at in (("line-a", time.time()), ("line-b", time.time() - 300)):
            members.add_site(name, 1)
            members.now = lambda at=at: at  # type: ignore[misc]
            members.seen(name, Report(state="idle", task="digits"))
        with members.db.begin() as session:
            for site in session.scalars(select(Site)):
                site.state = "member"
    # Known before a run is started, so none is.
    assert call(command) == 1
    told = capsys.readouterr().err
    assert "digits#1 is not promoted, and nothing has changed:" in told
    assert "site line-b is away (it does not report)" in told
    assert [line["what"] for line in audit.read(folder)][-1] == "promotion-refused"
    # Nothing uses another alias.
    assert call([*command, "--alias", "candidate"]) == 0
    assert call([*command, "--unmeasured", "--json"]) == 0
    shown = capsys.readouterr()
    assert "goes into production unmeasured" in shown.err
    assert "within a minute" in shown.err
    lines = [line for line in audit.read(folder) if line["what"] == "module-promoted"]
    assert [line["alias"] for line in lines] == ["candidate", "production"]
    assert lines[1]["measured"] == ["unmeasured: asked for with --unmeasured"]


def test_who_could_measure(folder: FederationFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.time()]
    with Registry(folder, now=lambda: now[0]) as registry:
        for name, task in (("a", "parts"), ("b", "parts"), ("c", "other"), ("d", "")):
            registry.add_site(name, 1)
            now[0] = time.time() - (300 if name == "b" else 0)
            registry.seen(name, Report(state="idle", task=task))
        assert fleet(folder, "parts") == Fleet((), ())  # nobody has joined
        with registry.db.begin() as session:
            for site in session.query(Site):
                site.state = "member"
    # One that never said its task may be of it.
    assert fleet(folder, "parts") == Fleet(("a",), ("b", "d"))


def reported(before: dict[str, int], now: dict[str, int], *, sure: float = 0.9) -> Report:
    expected = Answered(samples=sum(before.values()), confidence=0.9 * sum(before.values()), classes=before)  # fmt: skip
    seen = Answered(samples=sum(now.values()), confidence=sure * sum(now.values()), classes=now)
    day = DayUsage(day="2026-11-28", module=MODULE, answered=seen)
    state = ModuleState(digest=MODULE, expected=expected)
    return Report(state="idle", task="parts", module=state, usage=(day,))


@pytest.mark.parametrize(
    ("before", "now", "more", "told"),
    [
        ({"good": 90, "bad": 10}, {"good": 900, "bad": 100}, {}, ""),
        ({"good": 90, "bad": 10}, {"good": 400, "bad": 600}, {}, "50% of the answers go to other classes"),
        ({"good": 90, "bad": 10}, {"new": 500}, {}, "100% of the answers go to other classes"),
        ({"good": 90, "bad": 10}, {"good": 900, "bad": 100}, {"sure": 0.5}, "the mean confidence is 0.50, on the test samples 0.90"),
        # Too few to say.
        ({"good": 90, "bad": 10}, {"bad": 29}, {}, ""),
        ({"good": 20, "bad": 9}, {"bad": 500}, {}, ""),
        # By chance a class may be rarer among thirty.
        ({"good": 20, "bad": 20}, {"good": 20, "bad": 11}, {}, ""),
    ],
)  # fmt: skip
def test_drift_is_what_chance_does_not_explain(
    before: dict[str, int], now: dict[str, int], more: Any, told: str
) -> None:
    found = usage.drift(reported(before, now, **more))
    assert found.startswith(told) if told else found == ""


def test_drift_is_of_the_module_in_use_alone(folder: FederationFolder) -> None:
    report = reported({"good": 90, "bad": 10}, {"bad": 500})
    other = report.model_copy(update={"module": ModuleState(digest="cd" * 32, expected=Answered())})
    assert usage.drift(other) == ""
    assert usage.drift(Report(state="idle")) == ""


def test_days_are_kept_and_bounded(
    folder: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "DAYS_KEPT", 2)
    with Registry(folder) as registry:
        registry.add_site("a", 1)
        assert registry.usage("a") == []  # a folder of before has no table
        for day in ("2026-11-26", "2026-11-27", "2026-11-28", "2026-11-28"):
            sums = Answered(samples=3, confidence=2.5, classes={"傷": 3})
            one = DayUsage(day=day, module=MODULE, answered=sums)
            registry.seen("a", Report(state="idle", usage=(one,)))
        assert [d.day for d in registry.usage("a")] == ["2026-11-27", "2026-11-28"]
