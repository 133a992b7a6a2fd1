"""What a person asks `site join` for, made into the settings of the site: every fault at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable
from fedsplit.core.names import MAX_TASK_CHARS, RULE, is_name
from fedsplit.plant.join_code import JoinCode
from fedsplit.plant.site.folder import SETTINGS, SiteFile, SiteFolder
from fedsplit.plant.site.source_paths import absolute


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the person asks for. Empty: as site.toml says, where a site joins again."""

    code: JoinCode
    folder: Path
    data: str = ""
    task: str = ""
    cut: str = ""
    reading: dict[str, str] = field(default_factory=dict)
    """Keys of [reading]."""
    again: bool = False
    """New keys for a site that is a member as it is."""


def draft_of(folder: SiteFolder, wish: Wish, *, again: bool) -> SiteFile:
    """What site.toml will say; the server gives the name. Raises ConfigError with every fault."""
    data = absolute(wish.data) if wish.data else ""
    if again:
        there = folder.settings
        asked = {"data": data, "task": wish.task, "cut": wish.cut}
        given = [f"{k} = {v!r}" for k, v in asked.items() if v and v != getattr(there.site, k)]
        reading = there.reading.model_dump(by_alias=True)
        given += [f"{k} = {v!r}" for k, v in wish.reading.items() if v != str(reading[k])]
        if given:
            raise ConfigError(
                f"{printable(folder.path / SETTINGS)} says otherwise than {', '.join(given)}; a site that joins again keeps "
                f"its site.toml: change it there, or leave these options out"
            )
        return there
    faults = [
        f"--{key} is missing; give {example}"
        for key, value, example in (
            ("data", data, "the source, e.g. --data folder:/data/line-a"),
            ("task", wish.task, "the name of the task, e.g. --task inspection"),
        )
        if not value
    ]
    if wish.task and not is_name(wish.task, MAX_TASK_CHARS):
        faults.append(f"--task {printable(wish.task, limit=80)}: 1 to {MAX_TASK_CHARS} {RULE}")
    try:
        values: dict[str, Any] = {
            "site": {
                "name": "this site",
                "address": wish.code.address,
                "task": wish.task or "-",
                "data": data or "-",
                "cut": wish.cut,
            },
            "reading": wish.reading,
        }
        draft = SiteFile.model_validate(values)
    except ValidationError as err:
        faults += [
            f"--{e['loc'][-1]}: {printable(e['msg']).removeprefix('Value error, ')}"
            for e in err.errors()
        ]
    if faults:
        raise ConfigError(
            "the site cannot be made so:\n" + "\n".join(f"  - {fault}" for fault in faults)
        )
    return draft
