"""A run's module in the registry of modules. That it cannot be kept there is told, and never fails the run."""

from __future__ import annotations

from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FedsplitError
from fedsplit.core.records import Summary


def keep_module(
    config: RunConfig, folder: Path, summary: Summary, *, parent: str = ""
) -> list[str]:
    """Register the module in `folder`. Gives sentences for the run's notes where that failed, else none.

    `parent`: the digest of the module that the run was started from.
    """
    place = config.run.registry_folder
    if place is None:
        return []
    # SQLAlchemy: a grid's runs, which keep no versions, do without it.
    from fedsplit.registry.of_run import facts_of
    from fedsplit.registry.registry import ModuleRegistry

    try:
        facts = facts_of(summary, config.flat(), parents=[parent])
        with ModuleRegistry.open(place, create=True) as registry:
            registry.add(folder, facts)
    except FedsplitError as err:
        # Two, for a note has its length.
        return [
            f"the registry of modules does not have this run's module. Once it can be used, add it: fedsplit module import "
            f"{folder.parent} --registry {place}",
            f"why the registry of modules does not have it: {err}",
        ]
    return []
