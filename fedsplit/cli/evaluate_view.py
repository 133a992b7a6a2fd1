"""A verdict on a module as tables in the terminal, and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedsplit.core.foreign import printable
from fedsplit.predict.judge.ask import answers_needed
from fedsplit.predict.judge.classes import ClassVerdict
from fedsplit.predict.judge.compare import Comparison
from fedsplit.predict.judge.judged import Judged
from fedsplit.predict.judge.numbers import NumberVerdict
from fedsplit.report.units import NONE, percent, percent_of, points

_CLASSES_SHOWN, _WRONG_SHOWN, _CONFUSED_SHOWN = 40, 10, 12
_WRONG_RECORDED = 10_000


def shown(judged: Judged) -> RenderableType:
    """Everything there is to say, the notes last, where they are read."""
    verdict, what = judged.verdict, f"{judged.examples.kind}s"
    parts: list[RenderableType] = [
        Text(
            f"{printable(judged.module.name)} on {verdict.samples:,} {what} of {printable(judged.source)}",
            style="bold",
        ),
        "",
    ]
    if isinstance(verdict, ClassVerdict):
        parts += [_in_all(verdict), "", _classes(verdict), *_confusion(verdict)]
    else:
        parts += [_numbers(verdict)]
    parts += _wrong(judged)
    if judged.against is not None:
        name, compared = judged.against[0].name, judged.against[1]
        of_classes = isinstance(verdict, ClassVerdict)
        parts += ["", Text(_against(name, compared, of_classes=of_classes), style="bold")]
    if judged.notes:
        parts += ["", Text("Notes", style="bold"), *(Text(f"- {note}") for note in judged.notes)]
    return Group(*parts)


def _in_all(verdict: ClassVerdict) -> RenderableType:
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("Accuracy", f"{percent_of(verdict.accuracy, verdict.samples)} (95 % interval)")
    table.add_row("Mean recall of the classes", percent(verdict.mean_recall))
    table.add_row(
        "Calibration error",
        f"{100 * verdict.calibration_error:.1f} points between probability and accuracy",
    )
    return table


def _classes(verdict: ClassVerdict) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("Class", overflow="fold")
    for column in ("Samples", "Recall", "Precision", "Ask a person below", "Answers that stand"):
        table.add_column(column, justify="right")
    for one in verdict.classes[:_CLASSES_SHOWN]:
        ask = one.asking
        table.add_row(
            Text(printable(one.name, limit=80)),
            f"{one.samples:,}",
            percent(one.recall),
            percent(one.precision),
            "always ask" if ask.threshold is None else f"{ask.threshold:.3f}",
            NONE if ask.threshold is None else percent(ask.answered),
        )
    if (more := len(verdict.classes) - _CLASSES_SHOWN) > 0:
        table.add_row(f"and {more} more", *[""] * 5)
    table.caption = f"Of the answers that stand, at most {percent(verdict.risk)} are wrong, with 95 % certainty for each class."
    if any(one.asking.threshold is None for one in verdict.classes):
        needed = answers_needed(verdict.risk, verdict.samples)
        table.caption = (
            f"{table.caption}\nTo show that, the surest {needed:,} answers of a class must be right; with fewer, ask always: "
            f"judge more samples, or allow a larger --risk."
        )
    table.caption_justify = "left"
    return table


def _confusion(verdict: ClassVerdict) -> list[RenderableType]:
    """The matrix where it fits a terminal, else the pairs that are confused most."""
    names = [printable(one.name, limit=14) for one in verdict.classes]
    if len(names) <= _CONFUSED_SHOWN:
        table = Table(box=None, header_style="dim", title="Labels (rows) and answers (columns)")
        table.title_justify, table.title_style = "left", "dim"
        table.add_column("")
        for name in names:
            table.add_column(Text(name), justify="right")
        for i, (name, row) in enumerate(zip(names, verdict.confusion, strict=True)):
            cells = [
                Text(f"{n:,}" if n else "·", style="bold" if i == j else "")
                for j, n in enumerate(row)
            ]
            table.add_row(Text(name), *cells)
        return ["", table]
    pairs = sorted(
        (
            (n, names[i], names[j])
            for i, row in enumerate(verdict.confusion)
            for j, n in enumerate(row)
            if i != j and n
        ),
        key=lambda pair: -pair[0],
    )
    lines = [
        Text(f"- {n:,} x {label} taken for {answer}")
        for n, label, answer in pairs[:_CONFUSED_SHOWN]
    ]
    return ["", Text("Confused most", style="bold"), *lines] if lines else []


def _numbers(verdict: NumberVerdict) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    half, most, nearly = verdict.within
    table.add_row("Mean absolute error (MAE)", f"{verdict.mae:.6g}")
    table.add_row("Root mean squared error (RMSE)", f"{verdict.rmse:.6g}")
    table.add_row("R2", NONE if verdict.r2 is None else f"{verdict.r2:.4f}")
    table.add_row("Mean of prediction - label", f"{verdict.bias:+.6g}")
    table.add_row("Off by at most", f"{half:.6g} in 50 %, {most:.6g} in 90 %, {nearly:.6g} in 95 %")
    return table


def _wrong(judged: Judged) -> list[RenderableType]:
    if not judged.wrong:
        return []
    classes = isinstance(judged.verdict, ClassVerdict)
    title = "Wrong, the surest first" if classes else "Farthest off"
    table = Table(
        box=None,
        header_style="dim",
        title=f"{title} ({len(judged.wrong):,} in all)" if classes else title,
    )
    table.title_justify, table.title_style = "left", "bold"
    for column in ("Label", "Answer", *(("Probability",) if classes else ()), "Sample"):
        table.add_column(
            column, overflow="fold", justify="right" if column == "Probability" else "left"
        )
    for one in wrong(judged, _WRONG_SHOWN):
        cells = (
            [str(one["label"]), str(one["answer"])]
            if classes
            else [f"{one['label']:.6g}", f"{one['answer']:.6g}"]
        )
        sure = [f"{one['probability']:.3f}"] if classes else []
        table.add_row(
            *(Text(printable(c, limit=60)) for c in cells),
            *sure,
            Text(printable(one["input"], limit=120)),
        )
    return ["", table]


def _against(name: str, found: Comparison, *, of_classes: bool) -> str:
    low, high = found.interval
    certain = f"chance alone gives as much in {100 * found.p:.2g} % of cases"
    if of_classes:
        verdict = "better" if found.difference > 0 else "worse" if found.difference < 0 else "equal"
        told = f"{points(found.difference)} ({100 * low:+.1f} to {100 * high:+.1f})"
        what = f"right alone on {found.this_only:,}, wrong alone on {found.other_only:,}"
    else:
        verdict = (
            "nearer" if found.difference > 0 else "farther off" if found.difference < 0 else "equal"
        )
        told = f"{found.difference:+.6g} in MAE ({low:+.6g} to {high:+.6g})"
        what = f"nearer on {found.this_only:,} samples, farther on {found.other_only:,}"
    if not found.told_apart:
        verdict += ", but these samples cannot tell them apart"
    return f"Against {printable(name)}: {verdict}: {told}; {what}; {certain}"


def wrong(judged: Judged, most: int) -> list[dict[str, Any]]:
    """The samples answered wrongly, or of numbers the farthest off: `input`, `label`, `answer`, of classes `probability`."""
    examples = judged.examples
    found = []
    for i in judged.wrong[:most]:
        if examples.numbers is not None:
            said: dict[str, Any] = {
                "label": float(examples.numbers[i]),
                "answer": float(judged.answers[i]),
            }
        else:
            names = examples.classes
            said = {
                "label": names[int(examples.labels[i])],
                "answer": names[int(judged.answers[i])],
                "probability": float(judged.sure[i]),
            }
        found.append({"input": examples.origin(i), **said})
    return found


def record(judged: Judged) -> dict[str, Any]:
    """As one JSON object."""
    verdict = judged.verdict
    found: dict[str, Any] = {
        "module": {
            "name": judged.module.name,
            "digest": judged.module.digest,
            "task": judged.module.task,
        },
        "source": judged.source,
        "samples": verdict.samples,
    }
    if isinstance(verdict, ClassVerdict):
        found |= {
            "accuracy": verdict.accuracy,
            "accuracy_interval": list(verdict.interval),
            "classes": [one.name for one in verdict.classes],
            "recall": verdict.recall,
            "precision": {one.name: one.precision for one in verdict.classes},
            "mean_recall": verdict.mean_recall,
            "confusion": [list(row) for row in verdict.confusion],
            "calibration_error": verdict.calibration_error,
            "calibration": [asdict(one) for one in verdict.bins],
            "risk": verdict.risk,
            "ask_below": {one.name: asdict(one.asking) for one in verdict.classes},
            "coverage": [list(point) for point in verdict.coverage],
        }
    else:
        found |= asdict(verdict) | {"within": list(verdict.within)}
    found["wrong" if isinstance(verdict, ClassVerdict) else "farthest_off"] = wrong(
        judged, _WRONG_RECORDED
    )
    if judged.against is not None:
        module, compared = judged.against
        found["against"] = {
            "module": {"name": module.name, "digest": module.digest},
            **{k: v for k, v in asdict(compared).items() if k != "changed"},
            "interval": list(compared.interval),
            "told_apart": compared.told_apart,
            "changed": [judged.examples.origin(i) for i in compared.changed[:_WRONG_RECORDED]],
        }
    return found | {"notes": list(judged.notes)}
