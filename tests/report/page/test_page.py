"""The report of every kind of run: what it says, that it loads nothing, and that no name of a run becomes markup."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedsplit.cli.main import call
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, RunDirError
from fedsplit.core.records import LeftOut, RoundMetrics, SiteSummary, Status, Summary
from fedsplit.plant.server import audit
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.registry.registry import ModuleRegistry
from fedsplit.report.costs import Costs
from fedsplit.report.page import make_page
from fedsplit.report.page.subject import Confusion, Part, Run, Subject, read_run
from fedsplit.report.page.write import as_html, as_markdown
from fedsplit.report.words import _all
from tests.registry import modules
from tests.report import samples

KNOWN = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "main",
    "section",
    "footer",
    "h1",
    "h2",
    "h3",
    "h4",
    "div",
    "p",
    "sup",
    "a",
    "span",
    "ul",
    "ol",
    "li",
    "pre",
    "figure",
    "figcaption",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "svg",
    "g",
    "path",
    "defs",
    "use",
    "text",
    "clippath",
    "rect",
}
VOID = {"meta", "br", "img", "link", "input", "hr"}
COSTS = """
currency = "JPY"
seconds-a-part = { value = 9, low = 6, high = 12, source = "own" }
parts-a-month = { value = 40000, low = 30000, high = 50000, source = "own" }
reinspected-share = { value = 0.2, low = 0.1, high = 0.3, source = "assumed" }
defect-rate = { value = 0.01, source = "own" }
false-alarm-minutes = { value = 1, low = 0.5, high = 2, source = "own" }
hour-cost = { value = 3000, low = 2500, high = 3500, source = "own" }
machine-cost = { value = 300000, source = "own" }
"""


class Elements(HTMLParser):
    """The elements of a page: their names and attributes, whether all are closed, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def write(
    folder: Path,
    lines: list[RoundMetrics],
    record: Summary | None,
    *,
    classes: list[str] | None = None,
    **config: Any,
) -> Path:
    """A run's folder with its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "config": RunConfig.defaults() | {"data": "digits", "task": "digits"} | config,
        "classes": classes if classes is not None else ["ok", "scratch", "dent"],
        "versions": {"fedsplit": "0.1.0", "torch": "2.8"},
        "backbone_sha256": "ab" * 32,
    }
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        "".join(m.model_dump_json() + "\n" for m in lines), encoding="utf-8"
    )
    if record is not None:
        (folder / "summary.json").write_text(record.model_dump_json(), encoding="utf-8")
    return folder


def page_of(run: Path, *, lang: str = "en", costs: Path | None = None) -> str:
    one = read_run(run)
    subject = Subject(title=one.name, runs=(one,))
    return as_html(make_page(subject, lang=lang, costs=Costs.read(costs) if costs else None)[0])


def loads_nothing(html: str) -> Elements:
    """No part from elsewhere and no code, and a policy that would stop both."""
    found = Elements(html)
    for name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith("#"), (name, value)
        assert not name.startswith("on"), name
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(found.names)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    policy = next(value for name, value in found.attributes if name == "content")
    assert policy.startswith("default-src 'none'")
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = samples.metrics()
    return write(tmp_path / "inspect", lines, samples.summary(lines))


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    path = tmp_path / "costs.toml"
    path.write_text(COSTS, encoding="utf-8")
    return path


def test_it_leads_with_the_two_figures_and_traces_them(run: Path, costs: Path) -> None:
    html = page_of(run, costs=costs)
    found = loads_nothing(html)
    text = found.text
    assert text.index("省力化指数") < text.index("投資回収期間") < text.index("How sure is this")
    assert (
        text.index("How sure is this")
        < text.index("What it rests on")
        < text.index("What was assumed")
    )
    assert text.index("What was assumed") < text.index("For the engineer")
    assert "80.0 %" in text
    assert "from 70.0 % to 90.0 %" in text
    assert "Given in costs.toml, line 5: assumed." in text
    assert "Machines: 4. Measured in run inspect (summary.json)." in text
    # Every number beside a figure leads to a source that is there.
    targets = {
        value[1:] for name, value in found.attributes if name == "href" and "source" in value
    }
    ids = {value for name, value in found.attributes if name == "id"}
    assert targets
    assert targets <= ids


def test_without_costs_it_tells_how_to_make_the_file(run: Path, tmp_path: Path) -> None:
    text = loads_nothing(page_of(run)).text
    assert "fedsplit report --costs-template > costs.toml" in text
    assert "JPY" not in text
    assert "Training samples" in text
    empty = tmp_path / "empty.toml"
    empty.write_text("", encoding="utf-8")
    text = loads_nothing(page_of(run, costs=empty)).text
    assert "has no value yet" in text
    assert "no money" in text


def test_japanese(run: Path, costs: Path) -> None:
    html = page_of(run, lang="ja", costs=costs)
    text = loads_nothing(html).text
    assert '<html lang="ja">' in html
    for words in ("投資回収期間", "仮定", "サイト別の性能", "円", "か月", "80.0 % ", "全サイト"):
        assert words.strip() in text
    assert "Share of" not in text


def test_every_key_has_both_languages_with_the_same_places() -> None:
    for key, both in _all().items():
        assert set(both) == {"en", "ja"}, key
        places = [
            {name for _, name, _, _ in string.Formatter().parse(both[lang]) if name}
            for lang in ("en", "ja")
        ]
        assert places[0] == places[1] or key == "date", key
    raw = (Path(__file__).parents[3] / "fedsplit/report/words.toml").read_text(encoding="utf-8")
    assert len(tomllib.loads(raw)) == raw.count("\nen = ")


def test_the_confusion_gives_the_rates_of_false_alarms_and_escapes(
    run: Path, tmp_path: Path
) -> None:
    one = read_run(run)
    counts = ((90, 6, 4), (3, 40, 2), (2, 1, 52))
    part = Part(**{**vars(one.parts[0]), "confusion": Confusion(("ok", "scratch", "dent"), counts)})
    subject = Subject(title="t", runs=(Run(one.name, one.folder, (part,), one.ended),))
    path = tmp_path / "c.toml"
    path.write_text('good-classes = ["ok"]\n' + COSTS, encoding="utf-8")
    page, found = make_page(subject, lang="en", costs=Costs.read(path))
    assert found.quantities["false-alarm-rate"].value == pytest.approx(0.1)
    assert found.quantities["escape-rate"].value == pytest.approx(0.05)
    assert "hours-alarms" in found.figures
    text = loads_nothing(as_html(page)).text
    assert "Recall and precision by class" in text
    assert "Measured in run inspect (summary.json). 10 / 100" in text
    path.write_text('good-classes = ["OK"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="the classes of task"):
        make_page(subject, lang="en", costs=Costs.read(path))


def test_absent_sites_are_named_and_a_partial_run_is_no_success(tmp_path: Path) -> None:
    lines = samples.metrics(missed=((2, 2),))
    record = samples.summary(lines, outcome="partial", left_out=samples.LOST)
    text = loads_nothing(page_of(write(tmp_path / "r", lines, record))).text
    assert "Run r is partial" in text
    assert "no reply within deadline-s=600" in text
    failed = samples.summary([], outcome="failed", reason="too few sites", rounds=5, rounds_done=0, accuracy_global=None,
                             accuracy_global_start=None, accuracy_by_round=())  # fmt: skip
    text = loads_nothing(page_of(write(tmp_path / "f", [], failed))).text
    assert "Run f failed: too few sites" in text
    assert "Nothing was tested" in text


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    lines = [m for m in samples.metrics(rounds=8) if m.round <= 3]
    folder = write(tmp_path / "now", lines, None)
    status = Status(phase="training", round=4, rounds=8, sites=("site-0",), replied=())
    (folder / "status.json").write_text(status.model_dump_json(), encoding="utf-8")
    text = loads_nothing(page_of(folder)).text
    assert "goes on: 2 of 8 rounds are done" in text
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(RunDirError, match="nor a line of metrics yet"):
        read_run(folder)


def test_numbers_in_place_of_classes(tmp_path: Path) -> None:
    scores = {"mae": 0.25, "rmse": 0.4, "r2": 0.9}
    lines = [
        RoundMetrics.model_validate(
            m.model_dump() | {"sums_global": {"abs": 12.0, "sq": 8.0, "y": 1.0, "yy": 60.0}, "sums_personal": None,
                              "correct_global": None, "correct_personal": None}
        )
        for m in samples.metrics()
    ]  # fmt: skip
    record = samples.summary(lines).model_dump() | {
        "target": "number", "scores": scores, "scores_start": scores | {"mae": 0.5}, "accuracy_local_only": None,
        "scores_by_round": [scores, scores],
    }  # fmt: skip
    for key in [k for k in record if k.startswith("accuracy")]:
        del record[key]
    sites = [
        {k: v for k, v in s.items() if not k.startswith("accuracy")}
        | {"target": "number", "scores": scores, "scores_before": scores}
        for s in record["sites"]
    ]
    folder = write(tmp_path / "r", lines, None, classes=["number"], target="number")
    (folder / "summary.json").write_text(json.dumps(record | {"sites": sites}), encoding="utf-8")
    text = loads_nothing(page_of(folder)).text
    assert "MAE" in text
    assert "0.25" in text
    assert "RMSE" in text
    assert "95 % interval: " not in text


@pytest.mark.parametrize("sites", [1, 40])
def test_one_site_and_forty(tmp_path: Path, sites: int) -> None:
    lines = samples.metrics(sites=sites)
    html = page_of(
        write(tmp_path / "r", lines, samples.summary(lines), classes=[f"c{i}" for i in range(100)])
    )
    text = loads_nothing(html).text
    assert f"site-{sites - 1}" in text
    assert "100 classes" in text
    assert "and 80 more" in text


def test_a_hundred_classes_confused(run: Path) -> None:
    one = read_run(run)
    names = tuple(f"class {i}" for i in range(100))
    counts = tuple(
        tuple(20 if i == j else int((i * 7 + j) % 97 == 0) for j in range(100)) for i in range(100)
    )
    part = Part(**{**vars(one.parts[0]), "classes": names, "confusion": Confusion(names, counts)})
    subject = Subject(title="t", runs=(Run(one.name, one.folder, (part,), one.ended),))
    html = as_html(make_page(subject, lang="en")[0])
    loads_nothing(html)
    assert len(html) < 3_000_000


def test_several_tasks(tmp_path: Path) -> None:
    whole = tmp_path / "both"
    for task in ("weld", "paint"):
        lines = samples.metrics()
        write(whole / task, lines, samples.summary(lines, run="both", task=task))
    records = [json.loads((whole / t / "summary.json").read_text()) for t in ("weld", "paint")]
    (whole / "config.json").write_text(
        json.dumps({"config": {"tasks": "weld,paint"}}), encoding="utf-8"
    )
    (whole / "tasks.json").write_text(
        json.dumps({"run": "both", "tasks": records}), encoding="utf-8"
    )
    text = loads_nothing(page_of(whole)).text
    assert "For the engineer: both / weld" in text
    assert "Accuracy (paint)" in text


def test_another_version_and_what_is_no_run(run: Path, tmp_path: Path) -> None:
    raw = json.loads((run / "summary.json").read_text()) | {"fedsplit_version": "0.0.7", "shape": 1}
    (run / "summary.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(
        RunDirError, match=r"is of fedsplit 0\.0\.7.*make the report with that version"
    ):
        read_run(run)
    with pytest.raises(RunDirError, match="such as one of these: inspect"):
        read_run(tmp_path)
    with pytest.raises(RunDirError, match="is not there"):
        read_run(tmp_path / "nowhere")


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "]]></style><svg onload=1>", "$\\frac{1}{0}$", "{{7*7}}",
    "検査ライン|7", "a`b*c_d[e](http://x)", "&lt;b&gt;", "--><!--", "'; DROP", "%(x)s {name}", "\u3000", "=1+1",
]  # fmt: skip
names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(
        st.characters(blacklist_categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Co", "Cn"]),
        min_size=1,
        max_size=40,
    ),
).filter(lambda text: text.isprintable())


@given(
    st.lists(names, min_size=3, max_size=3, unique=True),
    st.lists(names, min_size=3, max_size=3, unique=True),
    st.text(max_size=60),
)
@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # A page takes a while, so a failure is shown as it was found.
    phases=[Phase.explicit, Phase.generate],
)
def test_no_name_becomes_markup(
    run: Path, sites: list[str], classes: list[str], reason: str
) -> None:
    one = read_run(run)
    part = one.parts[0]
    renamed = tuple(
        SiteSummary.model_validate(s.model_dump() | {"name": name, "notes": (reason,)})
        for s, name in zip(part.summary.sites, sites, strict=False)
    )
    summary = part.summary.model_copy(
        update={"sites": renamed, "task": classes[0], "left_out": (LeftOut(site=sites[0], rounds=(1,), reason=reason),), "reason": reason,
                "outcome": "partial", "backbone": reason}
    )  # fmt: skip
    counts = ((5, 1, 0), (0, 4, 1), (1, 1, 7))
    hostile = Part(**{
        **vars(part), "summary": summary, "classes": tuple(classes), "confusion": Confusion(tuple(classes), counts),
        "metrics": (),
    })  # fmt: skip
    subject = Subject(
        title=sites[1], runs=(Run(sites[2], one.folder, (hostile,), one.ended, by=reason),)
    )
    page, _ = make_page(subject, lang="en")
    found = loads_nothing(as_html(page))
    assert set(found.names) <= KNOWN
    for name in (sites[0], classes[1]):
        assert " ".join(name.split()) in " ".join(found.text.split())
    text = as_markdown(page)
    assert not re.search(r"(?<!\\)<", text)
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.endswith("|")


def test_the_command(
    run: Path, costs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, md = tmp_path / "r.html", tmp_path / "r.md"
    assert (
        call(
            [
                "report",
                str(run),
                "--out",
                str(out),
                "--md",
                str(md),
                "--costs",
                str(costs),
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["figures"]["index"]["value"] == pytest.approx(0.8)
    assert told["figures"]["payback"]["assumed"] is True
    loads_nothing(out.read_text(encoding="utf-8"))
    assert "| Site |" in md.read_text(encoding="utf-8")
    assert call(["report", "--costs-template", "--lang", "ja"]) == 0
    assert "seconds-a-part" in capsys.readouterr().out
    assert call(["report"]) == 2
    assert call(["report", str(run), "--lang", "de"]) == 2
    assert call(["report", str(run), "--since", "2026-01-01"]) == 2
    assert call(["report", str(run), "--out", str(tmp_path / "no" / "r.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_in_a_real_browser(run: Path, costs: Path, tmp_path: Path) -> None:
    """Nothing runs, nothing is asked of a network, nothing sticks out of the page, and Japanese stands in pictures."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("no Chromium here")
    lines = [
        RoundMetrics.model_validate(m.model_dump() | {"site": f"検査ライン{m.site[-1]}"})
        for m in samples.metrics()
    ]
    folder = write(tmp_path / "browser", lines, samples.summary(lines))
    path = tmp_path / "page.html"
    path.write_text(page_of(folder, lang="ja", costs=costs), encoding="utf-8")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(path.as_uri())
        assert asked == [path.as_uri()]
        assert not said
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        drawn = page.eval_on_selector_all("svg text", "all => all.map(e => e.textContent)")
        assert "検査ライン2" in drawn
        outside = page.eval_on_selector_all(
            "svg",
            "all => all.filter(s => [...s.querySelectorAll('text')].some(t => t.getBBox().x < -1)).length",
        )
        assert outside == 0
        browser.close()


def test_a_federation_of_a_period(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs, who started them, what the audit log and the registry hold; a run that cannot be read is named."""
    plant = tmp_path / "plant"
    plant.mkdir()
    (plant / "federation.toml").write_text(
        'format = 1\n[server]\nhost = "fl.example"\n', encoding="utf-8"
    )
    folder = FederationFolder.at(plant)
    lines = samples.metrics()
    for name, task in (("old", "weld"), ("new", "weld"), ("odd", "weld")):
        write(plant / "runs" / name, lines, samples.summary(lines, run=name, task=task))
        audit.record(folder, "run-started", "server", run=name, by="花子")
    long_ago = 1_700_000_000
    for path in (plant / "runs" / "old").iterdir():
        os.utime(path, (long_ago, long_ago))
    (plant / "runs" / "odd" / "summary.json").write_text("{", encoding="utf-8")
    audit.record(folder, "joined", "line <a>", serial="FF")
    with ModuleRegistry.open(folder.modules, create=True) as registry:
        made = modules.module(tmp_path / "m")
        version = registry.add(made, modules.facts(task="weld", run="new"))
        registry.promote(version.name, by="太郎", why="better")
    out, md = tmp_path / "r.html", tmp_path / "r.md"
    call_ = ["report", "--federation", str(plant), "--out", str(out), "--md", str(md), "--json"]
    assert call(call_) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == ["new", "old"]
    assert "odd" in told["unread"][0]
    text = loads_nothing(out.read_text(encoding="utf-8")).text
    assert "For the engineer: new" in text
    assert "For the engineer: old" not in text
    for words in ("花子", "line <a>", "weld#1", "太郎", "better", "promoted", "Not read:"):
        assert words in text, words
    assert "FF" not in text
    assert call([*call_, "--since", "2024-01-01"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == ["new"]
    assert call([*call_, "--since", "yesterday"]) == 2
    assert "write it as" in capsys.readouterr().err
    assert call([*call_, "--since", "2999-01-01"]) == 0
    assert "No run ended in this time" in loads_nothing(out.read_text(encoding="utf-8")).text
    capsys.readouterr()
    assert call(["report", "new", "--federation", str(plant), "--out", str(out)]) == 0
    assert "花子" in loads_nothing(out.read_text(encoding="utf-8")).text
    (folder.modules / "modules.db").write_bytes(b"no database")
    assert call(["report", "new", "--federation", str(plant), "--out", str(out)]) == 0
    assert "the registry of modules is not in the report" in capsys.readouterr().err
