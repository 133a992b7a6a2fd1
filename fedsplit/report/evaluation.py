"""What `fedsplit evaluate --out` leaves: pictures, a contact sheet of the samples it got wrong, and one page that has it all.

The page is one file without outside parts: images are in it, nothing is loaded and nothing runs. jinja2 escapes every
text, for names of classes and files are others'.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from fedsplit.core.errors import RunDirError
from fedsplit.core.foreign import printable
from fedsplit.core.whole_files import write_whole
from fedsplit.predict.judge import ClassVerdict
from fedsplit.predict.judge.judged import Judged
from fedsplit.report.contact_sheet import thumbnail
from fedsplit.report.evaluation_pictures import draw
from fedsplit.report.evaluation_sheet import MOST, caption, place, write_sheet
from fedsplit.report.units import NONE, percent, percent_of, points

PAGE, SHEET = "evaluation.html", "wrong.png"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_TEXT, _LONGEST, _CONFUSED = 300, 10_000, 15
_TITLES = {
    "confusion": "Which class is taken for which. A row is a label, a column an answer; a dark diagonal is good.",
    "recall": "How much of each class is found, and how far an answer can be trusted. The line is the 95 % interval.",
    "reliability": "Is the module as sure as it should be? Bars below the dashed line: it is too sure.",
    "risk-coverage": "If a person is asked about the least sure samples: how many errors are left among the others.",
    "residuals": "Answers against labels, and what is left over. A good module has its points on the dashed lines.",
}


@dataclass(frozen=True)
class _Wrong:
    """A sample that the module got wrong, as the page shows it."""

    name: str
    label: str
    answer: str
    image: Markup
    """As a data URI; empty for a text."""
    text: str


def write(out: Path, judged: Judged) -> Path:
    """Write pictures, sheet and page into the folder `out`, which is made; the page's path.

    Raises RunDirError where it cannot be written, DataError for an image that cannot be read.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise RunDirError(
            f"{out} cannot be made a folder ({err.strerror}); give another --out"
        ) from err
    pictures = {
        name: (_TITLES[name], _inlined(path.read_bytes()))
        for name, path in draw(out, judged).items()
    }
    notes = list(judged.notes)
    has_sheet = judged.examples.kind == "image" and bool(judged.wrong)
    if has_sheet:
        notes += write_sheet(out / SHEET, judged)
    else:
        (out / SHEET).unlink(missing_ok=True)  # of an earlier evaluation
    page = _environment().get_template("evaluation.html.j2")
    text = page.render(
        judged=judged, notes=notes, pictures=pictures, policy=_POLICY, most=MOST, wrong=list(_wrong(judged)),
        verdict=judged.verdict, of_classes=isinstance(judged.verdict, ClassVerdict),
        confused=_confused(judged), against=_against(judged),
    )  # fmt: skip
    try:
        # A file's name may hold bytes that are no text; `printable` has shown them as escapes.
        write_whole(out / PAGE, text)
    except OSError as err:
        raise RunDirError(
            f"{out / PAGE} cannot be written ({err.strerror}); free some space or give another --out"
        ) from err
    return out / PAGE


def _environment() -> Environment:
    made = Environment(
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    made.filters |= {"share": percent, "share_of": percent_of, "figure": _figure}
    made.globals |= {"dash": NONE}
    return made


def _shown(value: object) -> object:
    """Control characters and halves of characters as escapes; what is markup already stays."""
    return printable(value, limit=_LONGEST) if type(value) is str else value


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.6g}"


def _inlined(png: bytes) -> Markup:
    return Markup("data:image/png;base64,{}").format(base64.b64encode(png).decode())


def _wrong(judged: Judged) -> Iterator[_Wrong]:
    for i in judged.wrong[:MOST]:
        label, answer = caption(judged, i)
        image, text = Markup(), ""
        if judged.examples.kind == "image":
            buffer = io.BytesIO()
            thumbnail(judged.examples, i).save(buffer, format="PNG")
            image = _inlined(buffer.getvalue())
        else:
            text = printable(judged.examples.text(i), limit=_TEXT)
        yield _Wrong(place(judged, i), label, answer, image, text)


def _confused(judged: Judged) -> list[tuple[int, str, str]]:
    """(samples, label, answer), the most frequent first."""
    if not isinstance(judged.verdict, ClassVerdict):
        return []
    names = [one.name for one in judged.verdict.classes]
    pairs = [
        (n, names[i], names[j])
        for i, row in enumerate(judged.verdict.confusion)
        for j, n in enumerate(row)
        if i != j and n
    ]
    return sorted(pairs, key=lambda pair: -pair[0])[:_CONFUSED]


def _off_by(gain: float) -> str:
    """Of numbers: how much smaller the mean absolute error is."""
    return f"{abs(gain):.6g} {'more' if gain < 0 else 'less'} mean absolute error"


def _against(judged: Judged) -> dict[str, Any] | None:
    """What differs from the other module, in words."""
    if judged.against is None:
        return None
    module, found = judged.against
    classes = isinstance(judged.verdict, ClassVerdict)
    low, high = found.interval
    better, worse = ("better", "worse") if classes else ("nearer", "farther off")
    word = better if found.difference > 0 else worse if found.difference < 0 else "equal"
    return {
        "name": module.name,
        "digest": module.digest,
        "word": word if found.told_apart or word == "equal" else f"{word}, but these samples cannot tell the two apart",
        "difference": points(found.difference) if classes else _off_by(found.difference),
        "interval": f"{100 * low:+.1f} to {100 * high:+.1f} points" if classes else f"{low:+.6g} to {high:+.6g}",
        "this_only": found.this_only, "other_only": found.other_only, "p": f"{found.p:.3g}",
        "test": "McNemar's exact test" if classes else "the sign test",
        "alone": "right where the other one is wrong" if classes else "nearer than the other one",
        "other_alone": "wrong where the other one is right" if classes else "farther off",
        "changed": [place(judged, i) for i in found.changed[:MOST]], "changed_in_all": len(found.changed),
    }  # fmt: skip
