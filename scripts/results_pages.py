"""Bring docs/results.md, the pages of docs/results/ and their pictures in line with the numbers in docs/results/*.csv.

Of each page that has a results.csv of `fedsplit experiment`: the tables of accuracies and the words on what is bold. Of
docs/results.md: its tables. All other text stays as it is. Of each picture: final accuracies, from several grids on the
same data. A picture keeps a digest of its numbers, so that --check need not draw.

    python scripts/results_pages.py           write pages and pictures
    python scripts/results_pages.py --check   exit 1 and name what is out of date
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from PIL import Image

from fedsplit.experiment.results import Row, read_csv
from fedsplit.report.comparison_table import Columns, accuracy_tables, what_is_bold
from fedsplit.report.plots import STYLE
from fedsplit.report.ranking import ranking

DOCS = Path(__file__).resolve().parents[1] / "docs"
PICTURES = {
    "results-deeppcb": ("fedv-deeppcb", "fedv-deeppcb-encoder", "fedv-deeppcb-baselines"),
    "results-cifar10": ("fedv", "fedv-encoder", "fedv-baselines"),
    "results-work-orders": ("fedv-work-orders", "fedv-work-orders-baselines"),
}
DATA = dict(zip(("boards", "photographs", "work orders"), PICTURES.values(), strict=True))
"""Columns of docs/results.md -> the grids whose runs they show."""
_SHARED, _FULL = "FedV, shared encoder", "FedV, shared encoder, all weights"
HEADLINES = {
    "One model for all sites, accuracy in %": (
        "global accuracy, %",
        {
            "FedV, shared encoder": (_FULL, _SHARED, _FULL),
            "Ridge on frozen features, one round": ("Ridge",) * 3,
            "FESTA": ("FESTA",) * 3,
            "Fed-RoD": ("Fed-RoD",) * 3,
            "Linear probe": ("Linear probe",) * 3,
            "FedAvg of all weights": ("FedAvg, full, mean", "FedAvg, full", "FedAvg, full"),
            "One site with all data": (
                "Centralised, all weights from ridge",
                "Centralised, LoRA from ridge",
                "Centralised, LoRA from ridge",
            ),
        },
    ),
    "Each site's own model on its own samples, accuracy in %": (
        "personal accuracy, %",
        {
            "FedV, shared encoder, personal classifier": (f"{_SHARED}, personal classifier",) * 3,
            "Fed-RoD": ("Fed-RoD",) * 3,
            "FESTA": ("FESTA",) * 3,
            "Each site alone": ("Local only",) * 3,
        },
    ),
}
"""Heading in docs/results.md -> (table of a grid's page, row -> the method in each of DATA): at Dirichlet 0.1."""
STATE = re.compile(r"^(\d+ of \d+ runs are complete; ).*?(?=\. Added up|\.$)", re.MULTILINE)
DIGEST = "Numbers"
"""The key of a picture's digest."""
GATHERS = "Centralised"
"""The methods' names that begin so have all data in one place; these grids were run before results.csv told it."""


def pages() -> list[Path]:
    """The pages whose numbers are the rows of a grid."""
    tables = sorted((DOCS / "results").glob("*.csv"))
    return [
        csv.with_suffix(".md")
        for csv in tables
        if csv.with_suffix(".md").exists()
        and csv.read_text(encoding="utf-8").startswith("run,method,problem,")
    ]


def page(path: Path) -> str:
    """The text of a page as it should be. Raises ValueError where it has not the places for it."""
    rows = read_csv(path.with_suffix(".csv"))
    text = path.read_text(encoding="utf-8")
    words = what_is_bold(len({row.seed for row in rows}))
    text, found = STATE.subn(lambda match: match[1] + words, text)
    if found != 1:
        raise ValueError(f"{path.name}: no line 'N of M runs are complete; ...'")
    columns = Columns(rows)
    for problem in dict.fromkeys(row.problem for row in rows):
        here = [row for row in rows if row.problem == problem]
        for title, table in accuracy_tables(here, methods_of(here), columns).items():
            text = with_table(text, title, table)
    return text


def front_page(path: Path) -> str:
    """The text of docs/results.md as it should be. Raises ValueError where it has not the places for its tables."""
    text = path.read_text(encoding="utf-8")
    runs = {data: merged(grids) for data, grids in DATA.items()}
    for title, (measure, lines) in HEADLINES.items():
        rows = [
            row.model_copy(update={"method": label, "problem": "", "axes": (("partition", data),)})
            for label, methods in lines.items()
            for data, method in zip(DATA, methods, strict=True)
            for row in runs[data]
            if row.method == method and dict(row.axes)["partition"] == "dirichlet:0.1"
        ]
        tables = accuracy_tables(rows, list(lines), Columns(rows))
        text = with_table(text, title, tables[measure])
    return text


def with_table(text: str, title: str, table: str) -> str:
    """`text` with another table below a heading."""
    before, heading, rest = text.partition(f"\n## {title}\n\n")
    old, end, after = rest.partition("\n\n")
    if not heading or not old.startswith("| method |"):
        raise ValueError(f"no table below '## {title}'")
    return before + heading + table + (end or "\n") + after


def methods_of(rows: Sequence[Row]) -> list[str]:
    """Methods in the order of their first rows, which is the grid's."""
    return list(dict.fromkeys(row.method for row in rows))


def merged(names: Sequence[str]) -> list[Row]:
    """The rows of several grids on the same data; of a run that is in two of them, the first."""
    found: dict[tuple[object, ...], Row] = {}
    for row in (row for name in names for row in read_csv(DOCS / "results" / f"{name}.csv")):
        one = row.model_copy(update={"gathers_data": row.method.startswith(GATHERS)})
        known = found.setdefault((row.method, row.axes, row.seed), one)
        if known.accuracy_global != row.accuracy_global:
            raise ValueError(f"{row.run} has two accuracies in {', '.join(names)}")
    return list(found.values())


def digest(rows: Sequence[Row]) -> str:
    """Of all numbers that a picture shows."""
    drawn = [(r.method, r.axes, r.seed, r.accuracy_global, r.bytes_up + r.bytes_down) for r in rows]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Write a picture with the digest of its numbers."""
    with rc_context(STYLE):
        ranking(rows, methods_of(rows)).savefig(path, dpi=110, metadata={DIGEST: digest(rows)})


def digest_in(path: Path) -> str:
    """The digest that a picture was written with; empty where there is none."""
    if not path.exists():
        return ""
    with Image.open(path) as picture:
        return str(picture.info.get(DIGEST, ""))


def out_of_date() -> dict[Path, Callable[[], object]]:
    """Files that are not what they should be -> what writes them anew."""
    found: dict[Path, Callable[[], object]] = {}
    wanted_of = {path: page(path) for path in pages()}
    if (front := DOCS / "results.md").exists():
        wanted_of[front] = front_page(front)
    for path, wanted in wanted_of.items():
        if path.read_text(encoding="utf-8") != wanted:
            found[path] = lambda path=path, wanted=wanted: path.write_text(wanted, encoding="utf-8")
    for name, names in PICTURES.items():
        path, rows = DOCS / "images" / f"{name}.png", merged(names)
        if digest_in(path) != digest(rows):
            found[path] = lambda path=path, rows=rows: draw(path, rows)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write docs/results/ and its pictures anew.")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    check = parser.parse_args().check
    for path, write in (found := out_of_date()).items():
        if not check:
            write()
        print(f"{path.relative_to(DOCS.parent)}: {'out of date' if check else 'written'}")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
