"""Does the runs of a grid, one after the other or in a few processes, and tells of each as it ends.

Runs that are already done are read instead. A process that dies (out of memory) fails its run
alone, and a new one takes its place. On every way out no process is left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType

import torch

from fedsplit.experiment.bench import Bench
from fedsplit.experiment.cells import Cell
from fedsplit.experiment.memo import MEMO_BYTES
from fedsplit.experiment.results import Row, failed_row, finished

OnDone = Callable[[Cell, Row, bool], None]
"""(cell, its row, whether it was done before)"""
_GRACE_S = 5.0


class Schedule:
    """Where runs are done. Use it in a `with`; `jobs` processes, or this one."""

    def __init__(self, *, jobs: int = 1) -> None:
        self.jobs = jobs
        self._workers: list[_Worker] = []
        self._bench: Bench | None = None

    def __enter__(self) -> Schedule:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end(now=error is not None)
        self._workers.clear()

    def go(self, cells: Iterable[Cell], on_done: OnDone) -> None:
        """Do all runs; cells with the same run share it. `on_done` is told of each cell once."""
        shared: dict[str, list[Cell]] = {}
        for cell in cells:
            shared.setdefault(cell.run, []).append(cell)

        def tell(first: Cell, row: Row, before: bool) -> None:
            for cell in shared[first.run]:
                about = {"method": cell.method, "problem": cell.problem, "axes": cell.axes}
                on_done(cell, row.model_copy(update=about), before)

        open_: deque[Cell] = deque()
        for first, *_ in shared.values():
            row = finished(first)
            if row is None:
                open_.append(first)
            else:
                tell(first, row, True)
        for cell, row in self._here(open_) if self.jobs == 1 else self._in_processes(open_):
            tell(cell, row, False)

    def _here(self, cells: deque[Cell]) -> Iterator[tuple[Cell, Row]]:
        self._bench = self._bench or Bench()
        while cells:
            cell = cells.popleft()
            yield cell, self._bench.run(cell)

    def _in_processes(self, cells: deque[Cell]) -> Iterator[tuple[Cell, Row]]:
        while len(self._workers) < min(self.jobs, len(cells)):
            self._workers.append(_Worker.start(MEMO_BYTES // self.jobs))
        while cells or any(worker.cell for worker in self._workers):
            for i, worker in enumerate(self._workers):
                if cells and worker.cell is None:
                    if not worker.give(cells[0]):  # it died while it had nothing to do
                        self._workers[i] = worker = _Worker.start(MEMO_BYTES // self.jobs)
                        worker.give(cells[0])
                    cells.popleft()
            busy = {worker.pipe: i for i, worker in enumerate(self._workers) if worker.cell}
            for pipe in wait(list(busy)):
                at = busy[pipe]  # type: ignore[index]
                worker = self._workers[at]
                cell = worker.cell
                assert cell is not None
                row = worker.take()
                if row is None:
                    row = failed_row(cell, worker.why_dead())
                    self._workers[at] = _Worker.start(MEMO_BYTES // self.jobs)
                yield cell, row


@dataclass
class _Worker:
    """A process with a Bench, and the cell that it is at."""

    process: SpawnProcess
    pipe: Connection
    cell: Cell | None = None

    @classmethod
    def start(cls, memo_bytes: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, memo_bytes), daemon=True)
        with _one_thread_each():
            process.start()
        theirs.close()
        return cls(process, ours)

    def give(self, cell: Cell) -> bool:
        """Hand it a cell. False when it is dead."""
        try:
            self.pipe.send(cell)
        except OSError:
            self.end(now=True)
            return False
        self.cell = cell
        return True

    def take(self) -> Row | None:
        """The row of its cell, None when it died over it."""
        self.cell = None
        try:
            row: Row = self.pipe.recv()
        except (EOFError, OSError):
            return None
        return row

    def why_dead(self) -> str:
        """What became of it, in words."""
        self.process.join(_GRACE_S)
        code = self.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        self.end(now=True)
        return (
            f"its process ended {how}; signal 9 means that memory ran out: use fewer --jobs or a smaller "
            f"batch-size"
        )

    def end(self, *, now: bool) -> None:
        """No more cells: let it end, or end it."""
        with contextlib.suppress(OSError):
            self.pipe.close()
        if now:
            self.process.terminate()
        self.process.join(_GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes share the machine's cores, so each computes with one thread: read by their OpenMP at its start."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _work(pipe: Connection, memo_bytes: int) -> None:
    """A worker's main: rows for cells, until the pipe ends."""
    # Ctrl-C goes to all processes of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    bench = Bench(memo_bytes=memo_bytes)
    while True:
        try:
            cell = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(bench.run(cell))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
