"""How many threads torch computes with in this process. Called wherever a process begins to compute."""

from __future__ import annotations

import torch

from fedsplit.core.cpus import usable_cpus


def limit_threads(wanted: int = 0) -> None:
    """So many threads; 0: torch's own choice, but no more than the CPUs that this process may use.

    Torch counts the machine's cores. In a container of two CPUs on a machine of 64 its threads wait for each other.
    """
    number = wanted or min(torch.get_num_threads(), usable_cpus())
    if number != torch.get_num_threads():
        torch.set_num_threads(number)
