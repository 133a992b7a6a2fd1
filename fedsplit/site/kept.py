"""What one process keeps for the sites that it is, from order to order and from run to run."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

from fedsplit.model.parts import PartPool
from fedsplit.training.activation_cache import ActivationCache
from fedsplit.training.flops import DeviceFlops
from fedsplit.training.site_data import SiteSources

# Runs whose activations are kept at a time.
MAX_RUNS = 2


class Kept:
    """Parts of the backbone, samples, activations, and what a sample costs. Safe to use from several threads."""

    def __init__(self) -> None:
        self.process = secrets.token_hex(4)
        """A random word: whoever reads a run's records sees which answers came of one process."""
        self.parts = PartPool()
        self.sources = SiteSources()
        self.flops = DeviceFlops()
        self._activations: OrderedDict[str, ActivationCache] = OrderedDict()
        self._lock = threading.Lock()

    def activations(self, source: str) -> ActivationCache:
        """One run's activations; in simulation those of all its sites, which share no sample."""
        with self._lock:
            found = self._activations.setdefault(source, ActivationCache())
            self._activations.move_to_end(source)
            while len(self._activations) > MAX_RUNS:
                self._activations.popitem(last=False)
        return found
