"""How far a long prediction is: a bar in a terminal, a line now and then in a log. Always on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedsplit.cli.console import Output

_LINE_S = 10.0


@contextmanager
def progress(
    out: Output, total: int | None, *, what: str, quiet: bool
) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more are done. `quiet`: the answers themselves run through the terminal."""
    if quiet and out.stderr.is_terminal:
        yield lambda _: None
    elif out.stderr.is_terminal:
        with _bar(out, total, what) as advance:
            yield advance
    else:
        yield _lines(out, total, what)


@contextmanager
def _bar(out: Output, total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(),
        TextColumn(
            "{task.completed:,}" + ("" if total is None else " of {task.total:,}") + f" {what}"
        ),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=out.stderr,
        transient=True,
    )
    began, done = time.perf_counter(), 0
    with bar:
        task = bar.add_task("", total=total, speed="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            speed = done / max(time.perf_counter() - began, 1e-9)
            bar.update(task, advance=count, speed=f"{speed:,.1f} a second")

        yield advance


def _lines(out: Output, total: int | None, what: str) -> Callable[[int], None]:
    began = said = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal said, done
        done += count
        now = time.perf_counter()
        if now - said < _LINE_S:
            return
        said, speed = now, done / (now - began)
        left = "" if total is None else f" of {total:,}"
        eta = "" if total is None else f", about {_span((total - done) / speed)} left"
        out.note(f"{done:,}{left} {what}, {speed:,.1f} a second{eta}")

    return advance


def _span(seconds: float) -> str:
    seconds = max(seconds, 0)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
