"""Arrays by place and number in bounded memory: prepared samples (loader.py), activations (activation_cache.py).

A place is what rows belong to, such as a source or a version of the module. When there is no room, the place that was used
longest ago is dropped whole. Within a place nothing makes room: epochs visit every sample once, so the oldest row is as
good as the newest.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Row = NDArray[Any]


@dataclass
class _Place:
    rows: dict[int, Row] = field(default_factory=dict)
    nbytes: int = 0
    used: int = 0
    """When it was last looked at, in looks."""


class RowCache:
    """Rows up to `max_bytes` over all places. Safe to use from several threads."""

    def __init__(self, max_bytes: int, *, places: MutableMapping[Any, Any] | None = None) -> None:
        """`places`: an empty mapping to keep them in, such as one that forgets a place with its key."""
        self._places: MutableMapping[Any, _Place] = {} if places is None else places
        self._lock = threading.Lock()
        self._looks = itertools.count(1)
        self._max_bytes = max_bytes
        self.full = False
        """Was there ever no room for a row beside those of its own place?"""

    @property
    def max_bytes(self) -> int:
        """What all rows may take."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        with self._lock:
            self._max_bytes = value
            while self.nbytes > value:
                del self._places[min(self._places, key=lambda place: self._places[place].used)]

    @property
    def nbytes(self) -> int:
        """What all rows take."""
        return sum(place.nbytes for place in list(self._places.values()))

    @property
    def places(self) -> list[Any]:
        """All places, that of longest ago first."""
        return sorted(self._places, key=lambda place: self._places[place].used)

    def use(self, place: Any) -> None:
        """Look at a place, which is made where there is none."""
        with self._lock:
            self._used(place)

    def drop(self, places: Sequence[Any]) -> None:
        """Let go of places and all of their rows."""
        with self._lock:
            for place in places:
                self._places.pop(place, None)

    def find(self, place: Any, keys: Sequence[int]) -> list[Row | None]:
        """The rows of a place that are kept, None for the others."""
        with self._lock:
            # Dropped meanwhile by a place that needed the room: nothing of it is known then.
            found = self._places.get(place)
            return [found.rows.get(key) for key in keys] if found else [None] * len(keys)

    def keep(self, place: Any, keys: Sequence[int], rows: Sequence[Row]) -> None:
        """Keep these rows, as far as there is room for them."""
        with self._lock:
            mine = self._used(place)
            for key, row in zip(keys, rows, strict=True):
                if key in mine.rows:
                    continue
                if self._make_room(row.nbytes, mine):
                    mine.rows[key] = row
                    mine.nbytes += row.nbytes
                else:
                    self.full = True

    def _make_room(self, wanted: int, mine: _Place) -> bool:
        """Is there room for so many bytes, after other places have been dropped for it?"""
        while self.nbytes + wanted > self._max_bytes:
            oldest = min(
                (p for p in self._places if self._places[p] is not mine),
                key=lambda place: self._places[place].used,
                default=None,
            )
            if oldest is None:
                return False
            del self._places[oldest]
        return True

    def _used(self, place: Any) -> _Place:
        found = self._places.setdefault(place, _Place())
        found.used = next(self._looks)
        return found
