"""The table of a grid as Markdown: accuracies with their deviation over seeds, costs, what was tuned, what failed.

Made anew from the rows after every run, so a table of half a grid says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from scipy.special import stdtrit

from fedsplit.experiment.results import Row
from fedsplit.report.units import NONE, human_bytes, human_seconds

Get = Callable[[Row], float | None]
DATA_NOT_COUNTED = "its data not counted"


def comparison_table(
    rows: Sequence[Row],
    *,
    name: str,
    description: str = "",
    methods: Sequence[str],
    runs: int,
    tuned: Sequence[str] = (),
    search_s: float = 0.0,
) -> str:
    """The whole page. `methods` gives the order, `runs` how many there will be, `tuned` lines about the search.

    `search_s`: seconds of the search's runs, added up.
    """
    columns = Columns(rows)
    parts = [f"# {name}", *([description] if description else []), _state(rows, runs, search_s)]
    for problem in dict.fromkeys(row.problem for row in rows):
        here = [row for row in rows if row.problem == problem]
        order = [m for m in methods if any(row.method == m for row in here)]
        head = f"{problem}: " if problem else ""
        for title, table in accuracy_tables(here, order, columns).items():
            parts += [f"## {title}", table]
        parts += [f"## {head}cost of a run, mean", _costs(here, order)]
        if gathered := [m for m in order if any(r.method == m and r.gathers_data for r in here)]:
            parts.append(
                f"{', '.join(gathered)}: {DATA_NOT_COUNTED}. The sites' data stand in one place there, and the bytes "
                f"that took them there would come on top."
            )
    if tuned:
        parts += ["## Tuning", "\n".join(f"- {line}" for line in tuned)]
    if bad := [row for row in rows if row.outcome != "complete"]:
        lines = (f"- {row.run} ({row.outcome}): {_cell(row.reason[:500])}" for row in bad)
        parts += ["## Runs that are not complete", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def accuracy_tables(
    rows: Sequence[Row], methods: Sequence[str], columns: Columns
) -> dict[str, str]:
    """Heading -> table, of the rows of one problem: global, personal and, where it was measured, each site alone."""
    head = f"{rows[0].problem}: " if rows[0].problem else ""
    tables = {
        f"{head}global accuracy, %": _accuracies(rows, methods, columns, global_accuracy),
        f"{head}personal accuracy, %": _accuracies(
            rows, methods, columns, lambda row: row.accuracy_personal
        ),
    }
    told = {row.method for row in rows if row.accuracy_local_only is not None}
    if alone := [method for method in methods if method in told]:
        tables[f"{head}each site alone, on everyone's samples, %"] = _accuracies(
            rows, alone, columns, lambda row: row.accuracy_local_only
        )
    return tables


def global_accuracy(row: Row) -> float | None:
    """The accuracy that methods are ranked by."""
    return row.accuracy_global


def what_is_bold(seeds: int) -> str:
    """The words on how the cells of a page came from its seeds, and which of them are bold."""
    if seeds == 1:
        return "one seed, so any difference may be noise"
    return (
        f"mean ± standard deviation over {seeds} seeds. Bold: the best of a column, if the 95 % interval of "
        f"its lead over each other method (paired by seed) excludes zero. (n=2): a cell with fewer runs"
    )


class Columns:
    """The places of a grid beside problem, method and seed, named by the axes that vary."""

    def __init__(self, rows: Sequence[Row]) -> None:
        keys = list(dict.fromkeys(key for row in rows for key, _ in row.axes))
        self._varying = [key for key in keys if len({dict(row.axes).get(key) for row in rows}) > 1]
        self._all = keys

    def of(self, row: Row) -> str:
        """The name of a row's column."""
        axes = dict(row.axes)
        keys = self._varying or (["partition"] if "partition" in self._all else [])
        words = (str(axes[k]) if k == "partition" else f"{k}={axes[k]}" for k in keys if k in axes)
        return ", ".join(words) or "result"

    def names(self, rows: Iterable[Row]) -> list[str]:
        """The columns of some rows, in the grid's order."""
        return list(dict.fromkeys(self.of(row) for row in rows))


def _state(rows: Sequence[Row], runs: int, search_s: float) -> str:
    seeds = len({row.seed for row in rows})
    complete = sum(row.outcome == "complete" for row in rows)
    text = f"{complete} of {runs} runs are complete; {what_is_bold(seeds)}"
    # Cells whose settings are equal share one run.
    seconds = sum({row.run: row.seconds for row in rows}.values())
    text += f". Added up, the runs took {human_seconds(seconds)}"
    text += f", their search {human_seconds(search_s)}" if search_s else ""
    return text + "."


def _accuracies(rows: Sequence[Row], methods: Sequence[str], columns: Columns, get: Get) -> str:
    names = columns.names(rows)
    values = {(m, c): by_seed(rows, m, c, columns, get) for m in methods for c in names}
    full = {c: max(len(values[m, c]) for m in methods) for c in names}
    best = {c: _clear_best({m: values[m, c] for m in methods}, full[c]) for c in names}
    lines = [
        [m, *(_cell_text(values[m, c], full[c], bold=m == best[c]) for c in names)] for m in methods
    ]
    return _markdown(["method", *names], lines)


def by_seed(
    rows: Sequence[Row], method: str, column: str, columns: Columns, get: Get
) -> dict[int, float]:
    """Seed -> percents of a cell's runs."""
    return {
        row.seed: 100 * value
        for row in rows
        if row.method == method and columns.of(row) == column and row.outcome != "failed"
        if (value := get(row)) is not None
    }


def _clear_best(cells: Mapping[str, Mapping[int, float]], full: int) -> str | None:
    """The method whose lead over each other one is outside the noise, or None. `full`: runs of a whole cell."""
    known = {method: cell for method, cell in cells.items() if cell}
    if full < 2 or len(known) < 2:
        return None
    best = max(known, key=lambda method: statistics.fmean(known[method].values()))
    if len(known[best]) < full:
        return None
    others = (cell for method, cell in known.items() if method != best)
    return best if all(_ahead(known[best], other) for other in others) else None


def _ahead(best: Mapping[int, float], other: Mapping[int, float]) -> bool:
    found = lead(best, other)
    return found is not None and found[0] > found[1]


def lead(best: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float] | None:
    """Mean difference over the seeds of both, and the half width of its 95 % interval (Student's t, paired); None below two."""
    gains = [best[seed] - other[seed] for seed in best.keys() & other.keys()]
    if len(gains) < 2:
        return None
    half = stdtrit(len(gains) - 1, 0.975) * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.fmean(gains), float(half)


def _cell_text(cell: Mapping[int, float], full: int, *, bold: bool) -> str:
    if not cell:
        return NONE
    values = list(cell.values())
    text = f"{statistics.fmean(values):.1f}"
    text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    text = f"**{text}**" if bold else text
    return f"{text} (n={len(values)})" if len(values) < full else text


def _costs(rows: Sequence[Row], methods: Sequence[str]) -> str:
    lines = []
    for method in methods:
        own = [row for row in rows if row.method == method and row.outcome != "failed"]
        if not own:
            lines.append([method, *[NONE] * 7])
            continue
        flops = statistics.fmean(row.flops_device for row in own)
        lines.append(
            [
                method,
                human_bytes(statistics.fmean(row.bytes_up for row in own)),
                human_bytes(statistics.fmean(row.bytes_down for row in own)),
                human_bytes(
                    statistics.fmean(row.bytes_module_up + row.bytes_module_down for row in own)
                ),
                human_count(flops) if flops else NONE,
                human_seconds(statistics.fmean(row.seconds for row in own)),
                human_bytes(max(row.peak_rss_bytes for row in own)),
                str(len(own)),
            ]
        )
    head = [
        "method",
        "bytes up",
        "bytes down",
        "of it module",
        "device FLOPs",
        "seconds",
        "peak RSS",
        "runs",
    ]
    return _markdown(head, lines)


def human_count(count: float) -> str:
    """12, 3.4 k, 605 M, 1.18 T."""
    if abs(count) < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G", "T", "P", "E"):  # noqa: B007 - the last one is wanted behind the loop
        count /= 1000
        if abs(count) < 999.5:
            break
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (head, rule, *lines))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
