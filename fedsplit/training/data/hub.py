"""Data sets of the Hugging Face hub, for sites and tests that can reach it. Uses the split `train`.

The kind is image where a column is of type Image, else text. Called by source.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsplit.training.data.examples import Examples, Image, Kind, Request, build, digest_of
from fedsplit.training.data.pixels import read_pixels, to_bytes

_SPLIT = "train"


@dataclass(frozen=True, eq=False)
class HubItems:
    """One column of a data set on disk (Arrow), read row by row."""

    table: Any
    column: str
    kind: Kind
    request: Request
    where: str

    def get(self, i: int) -> Image | str:
        """Row `i`'s image or text."""
        try:
            value = self.table[i][self.column]
            if value is None:
                raise ValueError("the value is missing")
            if self.kind != "image":
                return str(value)
            return to_bytes(read_pixels(value), self.request.pixel_max)
        except (OSError, ValueError, SyntaxError) as err:
            raise self.request.fault(
                self.origin(i), f"cannot be read ({err}); leave this row out of the data set"
            ) from err

    def origin(self, i: int) -> str:
        """Data set, split and row."""
        return f"{self.where}[{_SPLIT}][{i}]"

    def digest(self, i: int) -> int:
        """Of the pixels or the text."""
        value = self.get(i)
        return digest_of(value.encode() if isinstance(value, str) else value.tobytes())


def read_hub(name: str, request: Request) -> Examples:
    """Read `hf:NAME`. Raises DataError when the hub cannot be reached or has no such data set."""
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
    kind: Kind = "image" if images else "text"
    items = HubItems(table, column, kind, request, where)
    return build(request, where, kind, items=items, names=_names(table, request))


def _names(table: Any, request: Request) -> list[str]:
    """Label names; an unlabelled row (None or -1) gets the empty name, which `build` reports."""
    feature = table.features[request.label_column]
    values = table[request.label_column]
    named = getattr(feature, "names", None)
    if named is None:
        return ["" if value is None else str(value).strip() for value in values]
    return ["" if value is None or value < 0 else str(named[value]) for value in values]
