"""The run's settings: small sections, frozen and valid from birth, each beside its own contradictions.

    section.py      what sections have in common; marks that a field may carry
    task.py, module.py, placement.py, train.py, server.py, link.py, run.py     the sections
    across.py       contradictions between sections
    misfits.py      what does not fit a backbone of some depth
    flat.py         the command line's pairs, and errors in words
    run_config.py   RunConfig: the sections together, and the one door for flat keys
    run_file.py     a run's TOML file: the same keys in tables

A new key is a field with a line of prose in its section, a line of `[tool.flwr.app.config]` in pyproject.toml, and
its row in docs/reference/config.md, which `scripts/config_reference.py` writes.
"""

from fedsplit.core.config.link import LinkSection
from fedsplit.core.config.module import ModuleSection
from fedsplit.core.config.placement import PlacementSection
from fedsplit.core.config.run import RunSection, unknown_method
from fedsplit.core.config.run_config import (
    FIELDS,
    NOT_GIVEN,
    RESUME_KEYS,
    SECTIONS,
    Origin,
    RunConfig,
    marked,
    parse_set,
)
from fedsplit.core.config.section import Mark, Section
from fedsplit.core.config.server import ServerSection
from fedsplit.core.config.task import PARTITIONS, TaskSection
from fedsplit.core.config.train import TrainSection

__all__ = [
    "FIELDS",
    "LinkSection",
    "Mark",
    "ModuleSection",
    "NOT_GIVEN",
    "Origin",
    "PARTITIONS",
    "PlacementSection",
    "RESUME_KEYS",
    "RunConfig",
    "RunSection",
    "SECTIONS",
    "Section",
    "ServerSection",
    "TaskSection",
    "TrainSection",
    "marked",
    "parse_set",
    "unknown_method",
]
