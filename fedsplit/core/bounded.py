"""`Bounded`: a function whose last answers are kept, by number; its owner may drop the oldest to save memory too.

Like functools.lru_cache, which neither shows what it holds nor lets go of one answer. Not safe to use from several threads
at once: the owner has a lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Key:
    """Arguments whose hash is made once: that of a run's settings takes longer than all the rest."""

    __slots__ = ("_args", "_hash")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._args, self._hash = args, hash(args)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._args == other._args


class Bounded(Generic[T]):
    """Call it as the function; equal arguments give the answer that is kept. What raises is not kept."""

    def __init__(self, function: Callable[..., T], entries: int) -> None:
        """`entries`: answers that are kept."""
        self.misses = 0
        """Calls of the function."""
        self._function = function
        self._entries = entries
        self._kept: OrderedDict[_Key, T] = OrderedDict()

    def __call__(self, *args: Any) -> T:
        """The function's answer."""
        key = _Key(args)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        value = self._kept[key] = self._function(*args)
        while len(self._kept) > self._entries:
            self.drop()
        return value

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def values(self) -> list[T]:
        """What is kept, the answer that was asked for longest ago first."""
        return list(self._kept.values())

    def drop(self, of: Callable[[T], bool] = lambda _: True) -> bool:
        """Let go of the answer, of those that `of` says, that was asked for longest ago. False: there is none."""
        oldest = next((key for key, value in self._kept.items() if of(value)), None)
        if oldest is None:
            return False
        del self._kept[oldest]
        return True

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()
        self.misses = 0
