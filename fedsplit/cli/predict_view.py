"""Where answers go as they come: rows on the terminal, a CSV file, one JSON object. None of them holds all answers in memory."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from rich.cells import cell_len, set_cell_size

from fedsplit.cli.console import Output
from fedsplit.core.errors import FolderError
from fedsplit.core.foreign import printable
from fedsplit.predict.answers import Answer
from fedsplit.predict.predictor import Predictor
from fedsplit.predict.stream import Answered, Unread

_IN_MEMORY = 16 * 2**20
_WIDEST_CLASS = 40
_MARK = "\ufeff"
"""By which Excel reads UTF-8."""


class _Writer(Protocol):
    def write(self, answered: Answered) -> None: ...

    def finish(self, record: dict[str, Any], /) -> None: ...


class View:
    """The writers of one command, and what could not be read."""

    def __init__(self, predictor: Predictor, writers: list[_Writer], files: ExitStack) -> None:
        self._predictor, self._writers, self._files = predictor, writers, files
        self.unread: list[Unread] = []
        self.answered = 0

    @property
    def prints(self) -> bool:
        """Do rows run through a terminal?"""
        return any(isinstance(w, _Rows) for w in self._writers) and sys.stdout.isatty()

    def add(self, batch: Sequence[Answered | Unread]) -> None:
        """Take in what became of a batch."""
        for one in batch:
            if isinstance(one, Unread):
                self.unread.append(one)
                continue
            self.answered += 1
            for writer in self._writers:
                writer.write(one)

    def finish(self, *, seconds: float, notes: Sequence[str]) -> None:
        """Give the CSV file its name, then write what stands at the end. Raises FolderError."""
        self._files.close()
        found = self._predictor.found
        facts: dict[str, Any] = {
            "module": {"name": found.name, "digest": found.digest, "task": found.task},
            "backbone_sha256": self._predictor.backbone.sha256,
            "classes": list(self._predictor.classes),
            "samples": self.answered,
            "seconds": round(seconds, 3),
            "per_second": round(self.answered / max(seconds, 1e-9), 3),
            "notes": list(notes),
        }
        facts["unreadable"] = [{"input": u.name, "problem": u.problem} for u in self.unread]
        for writer in self._writers:
            writer.finish(facts)


@contextmanager
def views(
    predictor: Predictor, out: Output, *, csv: str, scores: bool, excel: bool
) -> Iterator[View]:
    """The writers that the command's options ask for. Raises FolderError where the CSV file cannot be written."""
    writers: list[_Writer] = []
    with ExitStack() as opened:
        files = opened.enter_context(ExitStack())
        if csv == "-":
            writers.append(_Csv(sys.stdout, predictor, scores=scores))
        elif csv:
            file = files.enter_context(_csv_file(Path(csv).expanduser(), out, excel=excel))
            writers.append(_Csv(file, predictor, scores=scores))
        if out.as_json:
            writers.append(opened.enter_context(closing(_Json(scores=scores))))
        elif not csv:
            writers.append(_Rows(predictor.classes, scores=scores))
        yield View(predictor, writers, files)


@contextmanager
def _csv_file(path: Path, out: Output, *, excel: bool) -> Iterator[IO[str]]:
    """The file, which takes its name when it is whole; what was written before an error stays beside it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "is a folder" if path.is_dir() else "lies in a folder that is not there"
        raise FolderError(f"{path} {why}; give --csv the name of a file in a folder that is there")
    device = path.exists() and not path.is_file() and not path.is_dir()
    part = path if device else path.with_name(f"{path.name}.part")
    done = False
    try:
        # A file's name may hold bytes that are no text.
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(_MARK if excel else "")
            yield file
        if not device:
            part.replace(path)
        done = True
    except OSError as err:
        if isinstance(err, BrokenPipeError):
            raise
        raise FolderError(
            f"{path} cannot be written ({err.strerror or err}); free some space or give another file"
        ) from err
    finally:
        if not done and not device and part.is_file():
            out.note(f"the answers so far are in {part}")


class _Csv:
    """`input`, `class`, `probability`, and with scores a column `score:CLASS` each; or `input`, `number`."""

    def __init__(self, file: IO[str], predictor: Predictor, *, scores: bool) -> None:
        self._write = csv.writer(file, lineterminator="\n").writerow
        number = predictor.spec.numbers is not None
        self._scores = scores and not number
        names = ["input", "number"] if number else ["input", "class", "probability"]
        self._write([*names, *(f"score:{name}" for name in predictor.classes if self._scores)])

    def write(self, answered: Answered) -> None:
        answer = answered.answer
        said = [answer.value] if answer.is_number else [answer.name, answer.value]
        self._write([answered.name, *said, *(answer.values.tolist() if self._scores else ())])

    def finish(self, _record: dict[str, Any], /) -> None:
        """The file is closed by then."""


class _Rows:
    """Aligned rows on stdout as they come; the input last, for it may be long."""

    def __init__(self, classes: tuple[str, ...], *, scores: bool) -> None:
        self._width = min(_WIDEST_CLASS, max(5, *map(cell_len, classes)))
        self._scores, self._begun = scores, False
        # In a pipe or a file nothing is cut.
        self._columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000

    def write(self, answered: Answered) -> None:
        answer = answered.answer
        if not self._begun:
            self._begun = True
            self._line(
                "number" if answer.is_number else "class",
                "" if answer.is_number else "probability",
                "input",
            )
        if answer.is_number:
            self._line(f"{answer.value:.6g}", "", answered.name)
            return
        self._line(answer.name, f"{answer.value:.3f}", answered.name)
        if self._scores:
            sys.stdout.write(f"    {_by_size(answer)}\n")

    def _line(self, first: str, second: str, name: str) -> None:
        head = set_cell_size(printable(first), max(self._width, 10 if not second else 0)) + "  "
        head += f"{second:<11}  " if second else ""
        left = max(20, self._columns - cell_len(head) - 1)
        text = printable(name, limit=self._columns)
        if cell_len(text) > left:
            text = set_cell_size(text, left - 1) + "…"
        sys.stdout.write(f"{head}{text}\n")

    def finish(self, _record: dict[str, Any], /) -> None:
        sys.stdout.flush()


def _by_size(answer: Answer) -> str:
    ordered = sorted(answer.scores.items(), key=lambda one: -one[1])
    return "  ".join(f"{printable(name)} {share:.3f}" for name, share in ordered)


class _Json:
    """One object: the answers wait in a file where they are many."""

    def __init__(self, *, scores: bool) -> None:
        self._scores = scores
        self._kept = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - it lives as long as the command
            max_size=_IN_MEMORY, mode="w+", encoding="utf-8", errors="surrogatepass"
        )
        self._begun = False

    def write(self, answered: Answered) -> None:
        record = {"input": answered.name, **answered.answer.record(scores=self._scores)}
        self._kept.write((", " if self._begun else "") + self._text(record))
        self._begun = True

    def finish(self, record: dict[str, Any], /) -> None:
        head = self._text(record)
        sys.stdout.write(f'{head[:-1]}, "answers": [')
        self._kept.seek(0)
        shutil.copyfileobj(self._kept, sys.stdout)
        sys.stdout.write("]}\n")
        sys.stdout.flush()

    def close(self) -> None:
        self._kept.close()

    @staticmethod
    def _text(record: dict[str, Any]) -> str:
        unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
        return json.dumps(record, ensure_ascii=not unicode)
