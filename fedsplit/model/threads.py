"""How many threads torch computes with in this process. Called wherever a process begins to compute."""

from __future__ import annotations

import torch

from fedsplit.core.cpus import usable_cpus


class _Before:
    """What a wanted number replaced: the next caller may want none."""

    threads: int | None = None


def limit_threads(wanted: int = 0) -> None:
    """So many threads; 0: as many as there were before, but no more than the CPUs that this process may use.

    Torch counts the machine's cores. In a container of two CPUs on a machine of 64 its threads wait for each other.
    """
    now = torch.get_num_threads()
    number = wanted or min(_Before.threads or now, usable_cpus())
    _Before.threads = (_Before.threads or now) if wanted else None
    if number != now:
        torch.set_num_threads(number)
