"""What one process keeps for the sites that it is, from order to order and from run to run, within a memory budget.

Each thing is kept by what it is of, so that a process which lives for years never uses what has been replaced meanwhile:
parts by the backbone's digest, samples by the state of their files, activations by run, samples, cut and version.
"""

from __future__ import annotations

import secrets

from fedsplit.core.memory import available_bytes
from fedsplit.model.parts import PartPool
from fedsplit.training.activation_cache import ActivationCache
from fedsplit.training.flops import DeviceFlops
from fedsplit.training.site_data import SiteSources

MB = 10**6
# Of a machine that has more, for there may be several processes on it.
MOST_BYTES = 2500 * MB
# Idle parts, weights that no part uses, activations, prepared samples, samples.
_SHARES = 5


class Kept:
    """Parts of the backbone, samples, activations, and what a sample costs. Safe to use from several threads."""

    def __init__(self, memory_bytes: int = 0) -> None:
        """`memory_bytes`: what may be kept in all; 0: half of what is free now, at most MOST_BYTES."""
        self._own_bytes = self.memory_bytes = memory_bytes or min(
            MOST_BYTES, available_bytes() // 2
        )
        self.process = secrets.token_hex(4)
        """A random word: whoever reads a run's records sees which answers came of one process."""
        share = self.share_bytes
        self.parts = PartPool(max_idle_bytes=share)
        self.sources = SiteSources(data_bytes=share, prepared_bytes=share)
        self.flops = DeviceFlops()
        self.activations = ActivationCache(max_bytes=share)
        """Of all runs; in simulation those of all sites, which share no sample."""
        self._told: set[str] = set()

    @property
    def share_bytes(self) -> int:
        """What each kind of thing may take."""
        return self.memory_bytes // _SHARES

    def limit(self, memory_bytes: int) -> None:
        """Another budget from now on; 0: the one that it was made with."""
        memory_bytes = memory_bytes or self._own_bytes
        if memory_bytes == self.memory_bytes:
            return
        self.memory_bytes = memory_bytes
        share = self.share_bytes
        self.parts.limit(share)
        self.sources.limit(data_bytes=share, prepared_bytes=share)
        self.activations.rows.max_bytes = share

    def notes(self) -> list[str]:
        """What has become too large to be kept since the last call, a sentence each."""
        full = {
            "the modules of idle parts, or weights that are not in use, and builds or reads them again": self.parts.full,
            "data sets beside the one in use, and reads them again": self.sources.full,
            "prepared samples, and prepares the rest in each epoch": self.sources.prepared_full,
            "activations, and asks the encoder for the rest again": self.activations.rows.full,
        }
        new = {what for what, is_full in full.items() if is_full} - self._told
        self._told |= new
        return [
            f"this process has no more room than {self.share_bytes // MB} MB for {what}; memory-mb={self.memory_bytes // MB} "
            f"is what it may keep in all"
            for what in sorted(new)
        ]
