"""The plots are real pictures of a sane size, for every kind of run."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedsplit.core.errors import RunDirError
from fedsplit.report.plots import write_plots

from . import samples


def text_of(svg: Path) -> str:
    """The comments matplotlib leaves in an SVG: every text it drew."""
    return svg.read_text(encoding="utf-8")


def checked(run_dir: Path) -> None:
    """Write the plots and check the four files."""
    paths = write_plots(run_dir)
    assert {p.name for p in paths} == {"accuracy.png", "accuracy.svg", "traffic.png", "traffic.svg"}
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.width >= 800
                assert image.height >= 500
                assert len(image.convert("L").getcolors() or []) > 20
        else:
            ElementTree.parse(path)


def test_complete_run(tmp_path: Path) -> None:
    lines = samples.metrics()
    checked(samples.write(tmp_path, lines, samples.summary(lines)))
    svg = text_of(tmp_path / "accuracy.svg")
    for label in ("site-3", "all sites", "each site alone: 62.0 %", "before training: 30.0 %"):
        assert f"<!-- {label} -->" in svg
    svg = text_of(tmp_path / "traffic.svg")
    for label in ("activations sent", "module received", "full-model FedAvg", "site-0  (cut 0,6)"):
        assert f"<!-- {label} -->" in svg


def test_partial_run_says_so_in_the_title(tmp_path: Path) -> None:
    lines = samples.metrics(missed=((2, 2),))
    record = samples.summary(lines, outcome="partial", left_out=samples.LOST)
    checked(samples.write(tmp_path, lines, record))
    assert "(partial run)" in text_of(tmp_path / "accuracy.svg")


def test_more_sites_than_colours(tmp_path: Path) -> None:
    lines = samples.metrics(sites=15)
    checked(samples.write(tmp_path, lines, samples.summary(lines, accuracy_local_only=None)))
    assert "<!-- single sites -->" in text_of(tmp_path / "accuracy.svg")


def test_failed_before_the_first_round(tmp_path: Path) -> None:
    record = samples.summary(
        [], outcome="failed", accuracy_global=None, accuracy_global_start=None, accuracy_by_round=(),
        accuracy_local_only=None, bytes_full_model=0,
    )  # fmt: skip
    checked(samples.write(tmp_path, [], record))


def test_same_run_same_picture(tmp_path: Path) -> None:
    lines = samples.metrics()
    one, two = (samples.write(tmp_path / n, lines, samples.summary(lines)) for n in ("a", "b"))
    write_plots(one)
    write_plots(two)
    assert (one / "traffic.png").read_bytes() == (two / "traffic.png").read_bytes()


def test_no_summary(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"summary\.json cannot be read"):
        write_plots(tmp_path)


def test_damaged_metrics_line_is_named(tmp_path: Path) -> None:
    lines = samples.metrics()
    samples.write(tmp_path, lines, samples.summary(lines))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 1}\n')
    with pytest.raises(RunDirError, match="line 17"):
        write_plots(tmp_path)


def test_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    lines = samples.metrics()
    samples.write(tmp_path, lines, samples.summary(lines))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 1, "si')
    checked(tmp_path)
