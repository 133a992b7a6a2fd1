"""`fedsplit site install | uninstall`: a site as a service of its machine. The work is `fedsplit.plant.install`'s."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.cli.site_folder import SiteArgument, site_folder

if TYPE_CHECKING:
    from fedsplit.plant.site.folder import SiteFolder

UNIT = "fedsplit-site"
NameOption = Annotated[
    str, typer.Option("--name", metavar="UNIT", help="The service's name, where there are several.")
]


def install(
    site: SiteArgument = None, *, name: NameOption = UNIT, as_json: JsonFlag = False
) -> None:
    """Make the site a service of systemd, which starts with the machine: of the whole machine as root, else of this user.

    Without systemd the unit's text is written into the folder, and the command says what to do with it (exit code 1).
    """
    from fedsplit.core.errors import ConfigError
    from fedsplit.plant.lock import is_taken, running_pid

    out = Output(as_json=as_json)
    folder = site_folder(site)
    shown = shlex.quote(str(folder.path))
    if os.name == "nt":
        raise ConfigError(
            f"services of systemd are Linux's; on Windows have the task scheduler run this at the machine's start: "
            f"fedsplit site run {shown}"
        )
    from fedsplit.plant.install import has_systemd
    from fedsplit.plant.install import install as install_service

    if not has_systemd():
        unit = _write_unit(folder, name)
        out.show(
            f"systemd does not run on this machine, so no service was installed. The unit that would be is {unit}. "
            f"Have the service manager of this machine run this command, and start it again when it ends with another code "
            f"than 4:\n  fedsplit site run {shown}"
        )
        out.result({"folder": str(folder.path), "installed": False, "unit": str(unit)})
        raise typer.Exit(1)
    if is_taken(folder.state):
        raise ConfigError(
            f"the site of {shown} is up (process {running_pid(folder.state)}); end it, then install it"
        )
    unit_name = install_service("site", folder.path, reads=_reads(folder), name=name, say=out.note)
    out.result({"folder": str(folder.path), "installed": True, "unit": unit_name})


def uninstall(*, name: NameOption = UNIT, as_json: JsonFlag = False) -> None:
    """End the service and take it away. The site folder stays as it is, and the site a member."""
    from fedsplit.plant.install import has_systemd, remove

    out = Output(as_json=as_json)
    done = has_systemd() and remove(f"{name}.service", everywhere=os.geteuid() == 0)
    out.show(
        f"{name}.service is gone; the site folder is as it was"
        if done
        else f"there is no service {name}.service here; nothing was done"
    )
    out.result({"unit": f"{name}.service", "removed": done})
    if not done:
        raise typer.Exit(1)


def _reads(folder: SiteFolder) -> list[Path]:
    """What the service has to read outside its folder: the data."""
    _, colon, path = folder.settings.site.data.partition(":")
    return [Path(path)] if colon and Path(path).is_absolute() else []


def _write_unit(folder: SiteFolder, name: str) -> Path:
    from fedsplit.core.errors import FolderError
    from fedsplit.core.whole_files import write_whole
    from fedsplit.plant.units import Place, site_unit

    path = folder.path / f"{name}.service"
    try:
        write_whole(path, site_unit(Place(folder=folder.path, reads=tuple(_reads(folder)))))
    except OSError as err:
        raise FolderError(f"{path} cannot be written: {err.strerror}; correct its rights") from err
    return path
