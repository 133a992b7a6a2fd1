"""The table and the figures of a grid, from rows alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsplit.experiment.check import Dealt
from fedsplit.experiment.results import Row
from fedsplit.report.comparison import _curves, write_figures, write_labels
from fedsplit.report.comparison_table import Columns, comparison_table, human_count

METHODS = ["FedV", "Probe", "Closed form"]


def row(method: str, partition: str, seed: int, reached: float, **other: object) -> Row:
    curve = tuple(reached * share for share in (0.1, 0.8, 1.0))
    fields: dict[str, object] = {
        "run": f"{method}-{partition}-{seed}", "method": method, "problem": "p",
        "axes": (("partition", partition), ("sites", 4)), "seed": seed, "outcome": "complete", "rounds": 2,
        "accuracy_global": reached, "accuracy_personal": reached / 2, "accuracy_by_round": curve,
        "bytes_by_round": (0, 5_000_000, 10_000_000), "bytes_activation_up": 3_000_000, "bytes_activation_down": 4,
        "bytes_module_up": 1_000_000, "bytes_module_down": 1_000_000, "seconds": 60.0, "peak_rss_bytes": 10**9,
    }  # fmt: skip
    return Row.model_validate(fields | other)


@pytest.fixture
def rows() -> list[Row]:
    found = [
        row(m, p, s, 0.5 + 0.1 * i + 0.02 * s - (0.2 if p != "iid" else 0))
        for s in (0, 1)
        for p in ("iid", "dirichlet:0.1")
        for i, m in enumerate(METHODS[:2])
    ]
    one = {"accuracy_by_round": (0.7,), "bytes_by_round": (70_000,), "flops_device": 2 * 10**9}
    return [*found, row("Closed form", "iid", 0, 0.61, **one)]


def table(rows: list[Row], **other: object) -> str:
    return comparison_table(rows, name="g", methods=METHODS, runs=12, **other)  # type: ignore[arg-type]


def lines_of(text: str, method: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"| {method} |")]


def test_only_who_trained_alone_is_listed_as_alone(rows: list[Row]) -> None:
    assert "alone" not in table(rows)
    text = table([*rows[:-1], rows[-1].model_copy(update={"accuracy_local_only": 0.25})])
    alone = text.split("each site alone")[1].split("##")[0]
    assert lines_of(alone, "Closed form") == ["| Closed form | 25.0 | - |"]
    assert lines_of(alone, "FedV") == []


def test_means_deviations_and_the_best(rows: list[Row]) -> None:
    text = table(rows, description="Words.", tuned=["FedV: x"])
    assert text.startswith(
        "# g\n\nWords.\n\n9 of 12 runs are complete; mean ± standard deviation over 2 seeds"
    )
    assert "| method | iid | dirichlet:0.1 |" in text
    assert lines_of(text, "FedV")[0] == "| FedV | 51.0 ± 1.4 | 31.0 ± 1.4 |"
    # Probe leads FedV by the same at both seeds; against the closed form there is one pair, which tells nothing.
    assert lines_of(text, "Probe")[0] == "| Probe | 61.0 ± 1.4 | **41.0 ± 1.4** |"
    # A cell of one run of two says so, and is never bold.
    assert lines_of(text, "Closed form")[0] == "| Closed form | 61.0 (n=1) | - |"
    assert lines_of(text, "Probe")[1].startswith("| Probe | 30.5 ± 0.7 | **20.5 ± 0.7** |")
    assert (
        lines_of(text, "FedV")[2]
        == "| FedV | 4.00 MB | 1.00 MB | 2.00 MB | - | 60 s | 1.00 GB | 4 |"
    )
    assert "2.00 G" in lines_of(text, "Closed form")[2]
    assert "## Tuning\n\n- FedV: x" in text
    assert "a cell with fewer runs. Added up, the runs took 9 min 00 s.\n" in text
    assert "took 9 min 00 s, their search 90 s.\n" in table(rows, search_s=90.0)
    # Two cells of equal settings are one run.
    assert "took 9 min 00 s" in table([*rows, rows[-1].model_copy(update={"method": "Twin"})])
    assert "not complete" not in text


def test_a_lead_inside_the_noise_is_not_bold() -> None:
    """Student's t of three paired differences: 2, 3 and 4 points are a lead (t = 5.2 > 4.3), 0, 3 and 6 are none (1.7)."""
    for gains, clear in (((0.02, 0.03, 0.04), True), ((0.0, 0.03, 0.06), False)):
        found = [row("Probe", "iid", s, 0.5 + 0.1 * s) for s in range(3)]
        found += [row("FedV", "iid", s, 0.5 + 0.1 * s + gain) for s, gain in enumerate(gains)]
        assert lines_of(table(found), "FedV")[0].startswith("| FedV | **") == clear


def test_data_that_were_gathered_are_told_beside_the_bytes(rows: list[Row], tmp_path: Path) -> None:
    gathered = rows[0].model_copy(update={"method": "Central", "gathers_data": True})
    methods = [*METHODS, "Central"]
    text = comparison_table([*rows, gathered], name="g", methods=methods, runs=12)
    assert "Central: its data not counted." in text
    assert "data not counted" not in table(rows)
    write_figures(tmp_path, [*rows, gathered], methods=methods)
    # Text in an SVG is drawn as glyphs, and named in a comment.
    assert "Central (its data not counted)" in (tmp_path / "accuracy-bytes.svg").read_text()
    assert "Central (its" not in (tmp_path / "accuracy-rounds.svg").read_text()


def test_every_axis_has_numbers_and_starts_at_nothing(rows: list[Row]) -> None:
    for moved in ((0, 1_000_000, 1_200_000), (0, 2_000_000, 9_000_000), (0, 10_000, 10**9)):
        some = [r.model_copy(update={"bytes_by_round": moved}) for r in rows[:-1]]
        figure = _curves(some, METHODS, against_bytes=True)
        figure.draw_without_rendering()
        for axes in figure.axes:
            low, high = axes.get_xlim()
            numbers = [t for t in axes.get_xticks() if low <= t <= high]
            assert 2 <= len(numbers) <= 8, (moved, numbers)
            assert axes.get_ylim()[0] == 0


def test_what_failed_is_named_and_does_not_count(rows: list[Row]) -> None:
    bad = row("FedV", "iid", 2, 0.0).model_copy(
        update={"outcome": "failed", "reason": "no | luck\nat all", "accuracy_global": None}
    )
    text = table([*rows, bad])
    assert lines_of(text, "FedV")[0] == "| FedV | 51.0 ± 1.4 | 31.0 ± 1.4 |"
    assert "- FedV-iid-2 (failed): no \\| luck at all" in text
    only_bad = table([bad])
    assert lines_of(only_bad, "FedV")[0] == "| FedV | - |"


def test_columns_are_the_axes_that_vary(rows: list[Row]) -> None:
    assert Columns(rows).names(rows) == ["iid", "dirichlet:0.1"]
    more = [*rows, rows[0].model_copy(update={"axes": (("partition", "iid"), ("sites", 8))})]
    assert Columns(more).names(more) == ["iid, sites=4", "dirichlet:0.1, sites=4", "iid, sites=8"]
    bare = [rows[0].model_copy(update={"axes": ()})]
    assert Columns(bare).names(bare) == ["result"]


def test_human_count() -> None:
    assert [human_count(n) for n in (12, 3400, 605_000_000, 1.18e12)] == [
        "12",
        "3.40 k",
        "605 M",
        "1.18 T",
    ]


@pytest.mark.parametrize("length", [10, 25, 40, 60])
def test_a_legend_of_long_names_is_within_the_figure(tmp_path: Path, length: int) -> None:
    methods = [f"{i} " + "m" * (length - 2) for i in range(6)]
    write_figures(tmp_path, [row(m, "iid", 0, 0.5) for m in methods], methods=methods)
    with Image.open(tmp_path / "accuracy-rounds.png") as image:
        ink = np.asarray(image.convert("L")) < 250
    assert not ink[:, [0, 1, -2, -1]].any()
    assert ink[-60:].any()


def test_many_columns_go_into_rows(tmp_path: Path) -> None:
    sizes = {}
    for columns in (2, 4, 5, 9):
        found = [
            row("FedV", "iid", 0, 0.5, problem=p, axes=(("sites", n),))
            for p in ("p", "q")
            for n in range(columns)
        ]
        write_figures(tmp_path, found, methods=METHODS)
        with Image.open(tmp_path / "accuracy-rounds.png") as image:
            sizes[columns] = image.size
    assert sizes[2][0] < sizes[4][0] == sizes[5][0] == sizes[9][0]
    assert sizes[2][1] == sizes[4][1] < sizes[5][1] < sizes[9][1]


def test_figures_are_drawn(rows: list[Row], tmp_path: Path) -> None:
    failed = rows[0].model_copy(update={"outcome": "failed", "accuracy_by_round": ()})
    written = write_figures(tmp_path, [*rows, failed], methods=METHODS)
    two = ("scratch", "a name that is far too long to stand under it")
    counts = {
        "iid": Dealt(two, ((5, 5),) * 3),
        "dirichlet:0.1": Dealt(two, ((9, 0), (0, 4), (1, 6))),
    }
    sixty = tuple(map(str, range(60)))
    many = {"iid, 100 sites": Dealt(sixty, tuple((i % 7,) * 60 for i in range(100)))}
    written += write_labels(tmp_path, {"p": counts, "": many})
    names = ("accuracy-bytes", "accuracy-rounds", "labels-p", "labels")
    assert [p.name for p in written] == [f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 200
                assert len(set(np.asarray(image.convert("L")).ravel())) > 20
        else:
            assert "<svg" in path.read_text()[:1000]
    assert "scratch" in (tmp_path / "labels-p.svg").read_text()
    assert sorted(tmp_path.glob(".*")) == []
    assert write_figures(tmp_path, [failed], methods=METHODS) == ()
