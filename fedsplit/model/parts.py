"""Device parts that are used again: a process that plays many sites builds each kind of part a few times, not per site.

Building a skeleton costs some 100 ms and its frozen tensors the backbone's size. A `PartPool` lends a part
exclusively and takes it back; parts of one backbone share one copy of its frozen tensors. A borrowed part is as
good as a new one once `module.load` has filled it: that sets every value that can differ. All is kept by the backbone's
digest: another run, task or folder with the same weights uses what is there, and weights that were replaced are read anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fedsplit.core.cut import Cut
from fedsplit.core.errors import BackboneError
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.checkpoint import load_tensors
from fedsplit.model.module import ModuleSpec
from fedsplit.model.part import Part
from fedsplit.model.split import device_part

# As many sites as a simulation has at work at a time (experiment/grid.py); more would only hold memory.
MAX_IDLE = 32
# Parts own more than LoRA where a module is full or has merged deltas. As much again is for weights that nobody uses now.
MAX_IDLE_BYTES = 512 * 2**20
# The backbones that one process goes through at a time.
MAX_BACKBONES = 2

_Key = tuple[str, Cut, ModuleSpec]


class FrozenWeights:
    """A backbone's tensors, each read from disk once, when it is first wanted. Safe to call from several threads."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        """Where missing ones are read from."""
        self.loads = 0
        """How often tensors were read from disk."""
        self._sha256 = backbone.sha256
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
                found = load_tensors(self.backbone.path, skeleton, missing)
                if self.backbone.sha256 != self._sha256:
                    raise BackboneError(
                        f"backbone {self.backbone.path}: its files were replaced while a run uses them; put them back, or "
                        f"start a new run"
                    )
                self.loads += 1
                self._read |= found
            return {n: self._read[n] for n in names}

    def nbytes(self, but: Collection[int] = ()) -> int:
        """Memory of the tensors that are held, without those that lie at the addresses `but`."""
        return sum(t.nbytes for t in list(self._read.values()) if t.data_ptr() not in but)

    def keep(self, places: Collection[int]) -> None:
        """Let go of tensors that lie elsewhere than at these addresses; parts that have them go on with them."""
        with self._lock:
            self._read = {n: t for n, t in self._read.items() if t.data_ptr() in places}


class PartPool:
    """Lends device parts, each to one borrower at a time; keeps a bounded number of idle ones, newest first."""

    def __init__(self, *, max_idle: int = MAX_IDLE, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        """`max_idle_bytes`: what idle parts may own, and what weights may take that no part uses."""
        self._max_idle, self._max_idle_bytes = max_idle, max_idle_bytes
        self._idle: list[tuple[_Key, Part]] = []
        self._frozen: OrderedDict[str, FrozenWeights] = OrderedDict()
        self._forgotten_loads = 0
        self._lock = threading.Lock()
        self.full = False
        """Was there ever too little room?"""

    @property
    def idle(self) -> int:
        """Parts that wait for a borrower."""
        return len(self._idle)

    @property
    def loads(self) -> int:
        """How often tensors of a backbone were read from disk so far."""
        return self._forgotten_loads + sum(w.loads for w in list(self._frozen.values()))

    def limit(self, max_idle_bytes: int) -> None:
        """Another bound from now on."""
        with self._lock:
            self._max_idle_bytes = max_idle_bytes
            self._make_room()

    def frozen(self, backbone: Backbone) -> FrozenWeights:
        """The shared frozen tensors of a backbone, for parts that are made elsewhere."""
        key = backbone.sha256
        with self._lock:
            weights = self._frozen.setdefault(key, FrozenWeights(backbone))
            # The folder that it was found in last: an older one may be gone.
            weights.backbone = backbone
            self._frozen.move_to_end(key)
            self._make_room()
        return weights

    @contextmanager
    def borrowed(self, backbone: Backbone, cut: Cut, spec: ModuleSpec) -> Iterator[Part]:
        """A device part for the block's length; fill it with `module.load` before use.

        All of the module trains, as in a new part. After an error the part is not used again.
        """
        key = (backbone.sha256, cut, spec)
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
            self._make_room()

    def _make_room(self) -> None:
        """Let go of what was used longest ago: of idle parts, and of weights that no idle part has."""
        most = self._max_idle_bytes
        while self._idle and (
            len(self._idle) > self._max_idle or sum(_own_bytes(p) for _, p in self._idle) > most
        ):
            self.full = True
            self._idle.pop(0)
        others = list(self._frozen)[:-1]
        while others and (
            len(others) >= MAX_BACKBONES or sum(self._frozen[n].nbytes() for n in others) > most
        ):
            digest = others.pop(0)
            self._forgotten_loads += self._frozen.pop(digest).loads
            self._idle = [(key, part) for key, part in self._idle if key[0] != digest]
        for digest, weights in list(self._frozen.items())[-1:]:
            parts = [part for key, part in self._idle if key[0] == digest]
            used = {
                p.data_ptr() for part in parts for p in part.model.parameters() if not p.is_meta
            }
            # Only once a part has come back: one that is being built asks for its tensors in one go.
            if parts and weights.nbytes(but=used) > most:
                weights.keep(used)


def _own_bytes(part: Part) -> int:
    """Bytes that no other part shares: the module, and the weights to which merged deltas were added."""
    sizes = {n: 4 * p.numel() for n, p in module.parameters(part).items()}
    return sum(size * (1 if module.trains(n) else 2) for n, size in sizes.items())
