"""The tables say what the records say, and never call a subset a success."""

from __future__ import annotations

from rich.console import Console

from fedsplit.core.records import LeftOut, Summary
from fedsplit.report import exit_text, lost_sites, summary_view

from . import samples


def shown(record: Summary, width: int = 120) -> str:
    """The view as plain text."""
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_view(record))
    return capture.get()


def test_complete_run_shows_every_site_and_the_whole() -> None:
    text = shown(samples.summary(samples.metrics()))
    assert "complete: all 4 sites took part in all 3 rounds" in text
    for part in (
        "site-0",
        "site-3",
        "6,6",
        "30.0 %",
        "90.0 %",
        "33.3 MB",
        "540 MB",
        "62.0 % on average",
        "840 MB",
    ):
        assert part in text
    assert "gained +28.0 points" in text
    assert "Left out" not in text


def test_partial_run_names_the_lost_site_and_why() -> None:
    record = samples.summary(
        samples.metrics(), outcome="partial", left_out=samples.LOST, reason="site-2 missed round 2"
    )
    text = shown(record)
    assert "is partial" in text
    assert "complete" not in text
    assert "no reply within deadline-s=600" in text
    assert exit_text(record).endswith("site-2 missed round 2. Left out: site-2.")


def test_complete_with_a_lost_site_is_not_called_complete() -> None:
    record = samples.summary(samples.metrics(), left_out=samples.LOST)
    assert "complete" not in exit_text(record)
    assert "Left out: site-2." in exit_text(record)


def test_site_that_never_came_has_a_row() -> None:
    left = (LeftOut(site="site-9", rounds=(0,), reason="did not answer the roll call"),)
    text = shown(samples.summary(samples.metrics(), outcome="partial", left_out=left))
    assert "took no part" in text
    assert "roll call" in text


def test_failed_run_without_sites() -> None:
    record = samples.summary(
        [], outcome="failed", reason="1 site connected, min-sites=2 are wanted", rounds_done=0,
        accuracy_global=None, accuracy_global_start=None, accuracy_by_round=(), accuracy_local_only=None,
    )  # fmt: skip
    text = shown(record)
    assert "failed after 0 of" in text
    assert "min-sites=2" in text
    # No round, no numbers: the reason stands alone.
    assert "The whole federation" not in text


def test_training_together_that_did_not_help_is_said() -> None:
    text = shown(samples.summary(samples.metrics(), accuracy_local_only=0.95))
    assert "did not help: -5.0 points" in text


def test_moving_more_than_the_full_model_is_said() -> None:
    assert "more" in shown(samples.summary(samples.metrics(), bytes_full_model=1_000_000))


def test_site_names_are_not_read_as_markup() -> None:
    lines = [m.model_copy(update={"site": "[red]halle[/red]"}) for m in samples.metrics(sites=1)]
    assert "[red]halle[/red]" in shown(samples.summary(lines))


def test_everything_fits_eighty_columns() -> None:
    text = shown(samples.summary(samples.metrics()), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_lost_sites_are_each_named_once() -> None:
    left = (*samples.LOST, LeftOut(site="site-2", rounds=(3,), reason="again"))
    assert lost_sites(samples.summary(samples.metrics(), left_out=left)) == ("site-2",)


def test_a_classifier_of_zeros_is_no_accuracy_to_compare_with() -> None:
    assert "untrained ->" in shown(samples.summary(samples.metrics(), start="zero"))
    assert "30.0 % (24-37) -> 90.0 % (85-93)" in shown(samples.summary(samples.metrics()))


def test_what_sites_noted_is_shown_once_with_their_names() -> None:
    record = samples.summary(samples.metrics())
    notes = (
        ("pages are left out",),
        ("pages are left out", "one class has no test sample"),
        (),
        (),
    )
    sites = tuple(
        site.model_copy(update={"notes": told})
        for site, told in zip(record.sites, notes, strict=True)
    )
    text = shown(record.model_copy(update={"sites": sites}))
    assert text.count("pages are left out") == 1
    assert "site-0, site-1" in text
    assert "one class has no test sample" in text
