"""Data sets of the Hugging Face hub, for sites and tests that can reach it. Uses the split `train`.

The kind is image where a column is of type Image, else text. Images are opened here, not by
`datasets`, which cuts 16-bit colours to 8; like files they are looked at once, for their range and
for what is broken.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image as Pillow

from fedsplit.core.errors import DataError
from fedsplit.core.extras import extra
from fedsplit.core.foreign import printable
from fedsplit.model.families import InputKind
from fedsplit.training.data.examples import Examples, Image, Request, build, digest_of
from fedsplit.training.data.image_files import (
    PILLOW_ERRORS,
    Seen,
    check_size,
    opened,
    range_of,
    seen_in,
)
from fedsplit.training.data.pixels import read_pixels, to_bytes

_SPLIT = "train"


@dataclass(frozen=True, eq=False)
class HubItems:
    """One column of a data set on disk (Arrow), read row by row."""

    table: Any
    column: str
    kind: InputKind
    request: Request
    where: str
    white: float = 0.0
    """Value of white in images whose format does not say it; 0: there are none."""

    def get(self, i: int) -> Image | str:
        """Row `i`'s image or text."""
        try:
            if self.kind == "image":
                with self._opened(i) as image:
                    return to_bytes(read_pixels(image), self.white)
            value = self.table[i][self.column]
            if value is None:
                raise ValueError("the value is missing")
            return str(value)
        except PILLOW_ERRORS as err:
            raise self._broken(i, err) from err

    def look(self, i: int) -> Seen:
        """Decode row `i`'s image and say what it is like."""
        try:
            with self._opened(i) as image:
                return seen_in(image)
        except DataError as err:
            return Seen(err)
        except PILLOW_ERRORS as err:
            return Seen(self._broken(i, err))

    def _opened(self, i: int) -> Pillow.Image:
        value = self.table[i][self.column] or {}
        if not (value.get("bytes") or value.get("path")):
            raise ValueError("the value is missing")
        image = opened(io.BytesIO(value["bytes"]) if value.get("bytes") else str(value["path"]))
        check_size(self.request, self.origin(i), image)
        return image

    def _broken(self, i: int, err: BaseException) -> DataError:
        return self.request.fault(
            self.origin(i),
            f"cannot be read ({printable(err, limit=200)}); leave this row out of the data set",
        )

    def origin(self, i: int) -> str:
        """Data set, split and row."""
        return f"{self.where}[{_SPLIT}][{i}]"

    def digest(self, i: int) -> int:
        """Of the pixels or the text."""
        value = self.get(i)
        return digest_of(value.encode() if isinstance(value, str) else value.tobytes())

    @property
    def nbytes(self) -> int:
        """Rows are read from disk one by one."""
        return 0


def read_hub(name: str, request: Request) -> Examples:
    """Read `hf:NAME`. Raises DataError when the hub cannot be reached or has no such data set."""
    with extra("simulation", f"data=hf:{name}"):
        import datasets

    where = f"hf:{name}"
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, split=_SPLIT)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as err:
        raise request.fault(
            where,
            f"cannot be loaded ({str(err)[:300]}); check the name and the network, "
            "or use folder:, csv:, jsonl: or npz: with local data",
        ) from err
    features = table.features
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    column = images[0] if images else request.text_column
    for key in (column, request.label_column):
        if key not in features:
            raise request.fault(
                where, f"no column {key!r} in {sorted(features)}; set text-column and label-column"
            )
    kind: InputKind = "image" if images else "text"
    names = _names(table, request)
    if images:
        table = table.cast_column(column, datasets.Image(decode=False))
    items = HubItems(table, column, kind, request, where, request.pixel_max)
    examples = build(request, where, kind, items=items, names=names)
    if not images or request.listed is not None:
        return examples
    return _checked(examples, items, request)


def _checked(examples: Examples, items: HubItems, request: Request) -> Examples:
    """The examples with the range of all their images, without the broken rows where that is allowed."""
    seen = [items.look(int(key)) for key in examples.keys]
    broken = [one.fault for one in seen if one.fault is not None]
    notes = []
    if broken:
        if not request.leave_out_broken:
            raise broken[0]
        notes.append(
            f"{len(broken)} broken rows are left out (broken-files=leave-out); the first says: {broken[0]}"
        )
        examples = examples.subset([i for i, one in enumerate(seen) if one.fault is None])
        if len(examples) < 2:
            raise request.fault(
                items.where, f"all rows but {len(examples)} are broken; {broken[0]}"
            )
    white, more = range_of(seen, request, items.where)
    return examples.with_notes(
        replace(items, white=white), pixel_max=white or 255.0, notes=(*notes, *more)
    )


def _names(table: Any, request: Request) -> list[str]:
    """Label names; an unlabelled row (None or -1) gets the empty name, which `build` reports."""
    feature = table.features[request.label_column]
    values = table[request.label_column]
    named = getattr(feature, "names", None)
    if named is None or request.target == "number":
        return ["" if value is None else str(value).strip() for value in values]
    return ["" if value is None or value < 0 else str(named[value]) for value in values]
