"""Device parts that are used again: a process that plays many sites builds each kind of part a few times, not per site.

Building a skeleton costs some 100 ms and its frozen tensors the backbone's size. A `PartPool` lends a part
exclusively and takes it back; parts of one backbone share one copy of its frozen tensors. A borrowed part is as
good as a new one once `module.load` has filled it: that sets every value that can differ.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from fedsplit.core.cut import Cut
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.checkpoint import load_tensors
from fedsplit.model.module import ModuleSpec
from fedsplit.model.part import Part
from fedsplit.model.split import device_part

# As many sites as a simulation has at work at a time (experiment/grid.py); more would only hold memory.
MAX_IDLE = 32
# Parts own more than LoRA where a module is full or has merged deltas.
MAX_IDLE_BYTES = 512 * 2**20
# The backbones that one process goes through at a time.
MAX_BACKBONES = 2

_Key = tuple[Path, str, Cut, ModuleSpec]


class FrozenWeights:
    """A backbone's tensors, each read from disk once, when it is first wanted. Safe to call from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are held."""
        return frozenset(self._read)

    def __call__(self, skeleton: nn.Module, names: set[str]) -> Mapping[str, Tensor]:
        """See `backbone.Weights`."""
        with self._lock:
            if missing := names - self._read.keys():
                self._read |= load_tensors(self._path, skeleton, missing)
            return {n: self._read[n] for n in names}


class PartPool:
    """Lends device parts, each to one borrower at a time; keeps a bounded number of idle ones, newest first."""

    def __init__(self, *, max_idle: int = MAX_IDLE, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle, self._max_idle_bytes = max_idle, max_idle_bytes
        self._idle: list[tuple[_Key, Part]] = []
        self._frozen: OrderedDict[tuple[Path, str], FrozenWeights] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def idle(self) -> int:
        """Parts that wait for a borrower."""
        return len(self._idle)

    def frozen(self, backbone: Backbone) -> FrozenWeights:
        """The shared frozen tensors of a backbone, for parts that are made elsewhere."""
        key = (backbone.path, backbone.sha256)
        with self._lock:
            weights = self._frozen.setdefault(key, FrozenWeights(backbone.path))
            self._frozen.move_to_end(key)
            while len(self._frozen) > MAX_BACKBONES:
                self._frozen.popitem(last=False)
        return weights

    @contextmanager
    def borrowed(self, backbone: Backbone, cut: Cut, spec: ModuleSpec) -> Iterator[Part]:
        """A device part for the block's length; fill it with `module.load` before use.

        All of the module trains, as in a new part. After an error the part is not used again.
        """
        key = (backbone.path, backbone.sha256, cut, spec)
        part = self._take(key)
        if part is None:
            part = device_part(backbone, cut, spec, weights=self.frozen(backbone))
        yield part
        # Also drops the gradients, so that an idle part holds no more than its module.
        module.train_only(part)
        self._keep(key, part)

    def _take(self, key: _Key) -> Part | None:
        with self._lock:
            for at in reversed(range(len(self._idle))):
                if self._idle[at][0] == key:
                    return self._idle.pop(at)[1]
        return None

    def _keep(self, key: _Key, part: Part) -> None:
        with self._lock:
            self._idle.append((key, part))
            while self._idle and (
                len(self._idle) > self._max_idle
                or sum(_own_bytes(p) for _, p in self._idle) > self._max_idle_bytes
            ):
                self._idle.pop(0)


def _own_bytes(part: Part) -> int:
    """Bytes that no other part shares: the module, and the weights to which merged deltas were added."""
    sizes = {n: 4 * p.numel() for n, p in module.parameters(part).items()}
    return sum(size * (1 if module.trains(n) else 2) for n, size in sizes.items())
