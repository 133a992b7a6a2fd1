"""The model card of an export, README.md: what was trained on what, how well it does at each site, and what is not known.

Sites' names are left out unless they are asked for: a card goes to other people. What the backbone's own card says of its
licence and its bias is quoted; fedsplit knows nothing of it itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsplit import __version__
from fedsplit.core.foreign import printable, read_json
from fedsplit.predict.predictor import Predictor

UNKNOWN = "not known: ask who published it"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_CARD = 256 << 10
_MAX_QUOTE = 3000
_BIAS = re.compile(r"bias|limitation|limits|risk|ethic", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the forms of an export differ in."""

    library: str
    """Hugging Face's name of the library that loads it; empty: fedsplit alone."""
    use: str
    """How to load it, in Markdown."""
    checks: tuple[str, ...]
    """What was measured at the export, a sentence each."""
    name_sites: bool = False


def card(predictor: Predictor, said: Said) -> str:
    """The text of README.md, with the front matter that Hugging Face reads."""
    backbone, spec = predictor.backbone, predictor.spec
    licence, bias = about_backbone(backbone.path)
    run = _run(predictor.found.folder)
    lines = ["---"]
    if said.library:
        lines.append(f"library_name: {said.library}")
    if _HUB_NAME.fullmatch(backbone.name):
        lines.append(f"base_model: {backbone.name}")
    task = "image-classification" if predictor.kind == "image" else "text-classification"
    lines += [f"pipeline_tag: {task}", "tags:", "- fedsplit", "---", ""]
    kinds = f"a {spec.kind} module" if spec.kind != "adapter" else "an adapter module"
    what = f"{len(spec.classes)} classes" if spec.numbers is None else "a number"
    name = predictor.found.task or "A trained module"
    lines += [
        f"# {name}",
        "",
        f"It predicts {what} from {'an image' if predictor.kind == 'image' else 'a text'}. fedsplit {__version__} trained "
        f"{kinds} on the frozen backbone {backbone.path.name} ({backbone.family.model_type}). The sites' data did not leave them.",
        "",
        f"- Digest of the module: `{predictor.found.digest}`",
        f"- Digest of the backbone: `{backbone.sha256}`",
    ]
    if spec.numbers is None:
        lines.append(
            "- Classes, in the order of the outputs: " + ", ".join(map(_cell, spec.classes))
        )
    lines += ["", "## Use", "", said.use, "", "## Checked at the export", ""]
    lines += [f"- {one}" for one in said.checks]
    lines += ["", "## Data and results", "", *_results(run, name_sites=said.name_sites)]
    lines += [
        "",
        "## Limits",
        "",
        "- The results hold for data like that of these sites' test samples. Measure it on your own data first.",
        "- It always answers with one of its classes, also for an input that belongs to none of them."
        if spec.numbers is None
        else "- A number outside the range of the training data is an extrapolation.",
        "- A module can reveal something of its training data. Do not publish it without the sites' consent.",
        "",
        "## The backbone",
        "",
        f"- Licence: {licence}",
        f"- Known bias and limits: {'see below' if bias else UNKNOWN}",
    ]
    if bias:
        lines += ["", "Its own card says:", "", *(f"> {line}" for line in bias.splitlines())]
    return "\n".join(lines) + "\n"


def about_backbone(folder: Path) -> tuple[str, str]:
    """(licence, what is said of bias and limits) of a backbone's own README.md; UNKNOWN and "" where it says nothing."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_MAX_CARD).decode("utf-8", errors="replace")
    except OSError:
        return UNKNOWN, ""
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    found = front and re.search(r"^license:[ \t]*(\S.*)$", front[1], re.MULTILINE)
    licence = printable(found[1].strip("\"' "), limit=100) if found else UNKNOWN
    quotes, level = [], 0
    for line in text[front.end() if front else 0 :].splitlines():
        heading = re.match(r"(#+)\s+(.*)", line)
        if heading and (not level or len(heading[1]) <= level):
            level = len(heading[1]) if _BIAS.search(heading[2]) else 0
        if level:
            quotes.append(printable(line.lstrip("# ") if heading else line, limit=1000))
    return licence, "\n".join(quotes)[:_MAX_QUOTE].strip()


def _run(folder: Path) -> dict[str, Any]:
    """What a run's summary or a registry's record says of the module: `samples`, `sites`, `scores`."""
    for file in (folder.parent / "summary.json", folder / "version.json"):
        try:
            said = read_json(file)
            return said if isinstance(said, dict) else {}
        except (OSError, ValueError):
            continue
    return {}


def _results(run: dict[str, Any], *, name_sites: bool) -> list[str]:
    rows = [r for r in run.get("sites", []) if isinstance(r, dict)]
    if not rows:
        return [
            "Not known: neither a run's summary nor a registry's record lies beside the module."
        ]
    lines = ["| site | samples | before | after |", "|---|---|---|---|"]
    for number, row in enumerate(rows, 1):
        name = _cell(row.get("name", "?")) if name_sites else f"site {number}"
        before, after = _score(row, "_before"), _score(row, "")
        lines.append(f"| {name} | {_cell(row.get('samples', '?'))} | {before} | {after} |")
    overall = run.get("accuracy_global")
    if overall is None:
        overall = (run.get("metrics") or {}).get("accuracy")
    if isinstance(overall, int | float):
        lines += ["", f"Accuracy over the test samples of all sites: {overall:.4f}."]
    outcome = run.get("outcome")
    if outcome and outcome != "complete":
        lines += ["", f"The run was {_cell(outcome)}: not all sites took part to its end."]
    return [*lines, "", "Each site measured on test samples of its own, which never trained."]


def _score(row: dict[str, Any], when: str) -> str:
    """A site's accuracy, or its error where the module predicts a number."""
    scores = row.get(f"scores{when}") or {}
    value = row.get(f"accuracy{when}", scores.get("accuracy"))
    if isinstance(value, int | float):
        return f"accuracy {value:.4f}"
    mae = scores.get("mae") if isinstance(scores, dict) else None
    return f"MAE {mae:.4g}" if isinstance(mae, int | float) else "not measured"


def _cell(value: object) -> str:
    return printable(value, limit=200).replace("|", "\\|").replace("<", "&lt;")
