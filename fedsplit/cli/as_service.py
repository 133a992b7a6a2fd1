"""`fedsplit server install | uninstall` and `fedsplit site install | uninstall`: the services of a folder as one of the machine's.

The work is `fedsplit.plant.install`'s; the text of the unit is `fedsplit.plant.units`'.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsplit.cli.console import Output

if TYPE_CHECKING:
    from fedsplit.plant.folder import PlantFolder
    from fedsplit.plant.units import Kind

NameOption = Annotated[
    str, typer.Option("--name", metavar="UNIT", help="The service's name, where there are several.")
]


@dataclass(frozen=True, kw_only=True)
class AsService:
    """What becomes a service."""

    kind: Kind
    folder: PlantFolder
    name: str
    """The unit's, without .service."""
    start: str
    """The command that starts it by hand, and the words before the folder."""
    unit_file: Path
    """Where the unit's text goes on a machine without systemd."""
    reads: Sequence[Path] = ()
    port: int = 0
    again: str = "when it ends"
    """When another service manager has to start it again."""

    @property
    def command(self) -> str:
        """What runs."""
        return f"{self.start} {shlex.quote(str(self.folder.path))}"


def install(what: AsService, out: Output) -> None:
    """Install it; without systemd write the unit's text, say what to do with it, and exit with 1. Raises ConfigError."""
    from fedsplit.core.errors import ConfigError
    from fedsplit.plant.lock import up_pid

    place = what.folder
    if os.name == "nt":
        raise ConfigError(
            f"services of systemd are Linux's; on Windows have the task scheduler run this at the machine's start: "
            f"{what.command}"
        )
    from fedsplit.plant.install import has_systemd
    from fedsplit.plant.install import install as install_service

    if not has_systemd():
        _write_unit(what)
        out.show(
            f"systemd does not run on this machine, so no service was installed. The unit that would be is {what.unit_file}. "
            f"Have the service manager of this machine run this command, and start it again {what.again}:\n  {what.command}"
        )
        out.result({"folder": str(place.path), "installed": False, "unit": str(what.unit_file)})
        raise typer.Exit(1)
    if pid := up_pid(place.state):
        raise ConfigError(
            f"the {what.kind} of {place.path} is up (process {pid}); end it, then install it"
        )
    unit = install_service(
        what.kind, place.path, reads=what.reads, port=what.port, name=what.name, say=out.note
    )
    out.result({"folder": str(place.path), "installed": True, "unit": unit})


def uninstall(name: str, kept: str, out: Output) -> None:
    """End the service and take it away; exit with 1 where there is none. `kept` says what stays."""
    from fedsplit.plant.install import has_systemd, remove

    unit = f"{name}.service"
    done = has_systemd() and remove(unit, everywhere=os.geteuid() == 0)
    out.show(
        f"{unit} is gone; {kept}" if done else f"there is no service {unit} here; nothing was done"
    )
    out.result({"unit": unit, "removed": done})
    if not done:
        raise typer.Exit(1)


def _write_unit(what: AsService) -> None:
    from fedsplit.core.errors import FolderError
    from fedsplit.core.whole_files import write_whole
    from fedsplit.plant.units import Place, server_unit, site_unit

    place = Place(folder=what.folder.path, reads=tuple(what.reads))
    text = server_unit(place, port=what.port) if what.kind == "server" else site_unit(place)
    try:
        what.unit_file.parent.mkdir(exist_ok=True)
        write_whole(what.unit_file, text)
    except OSError as err:
        raise FolderError(
            f"{what.unit_file} cannot be written: {err.strerror}; correct its rights"
        ) from err
