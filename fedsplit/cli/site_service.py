"""`fedsplit site install | uninstall`: a site as a service of its machine. What both sides do is as_service.py's."""

from __future__ import annotations

from pathlib import Path

from fedsplit.cli.as_service import AsService, NameOption
from fedsplit.cli.as_service import install as install_service
from fedsplit.cli.as_service import uninstall as uninstall_service
from fedsplit.cli.console import Output
from fedsplit.cli.run import JsonFlag
from fedsplit.cli.site_folder import SiteArgument, site_folder

UNIT = "fedsplit-site"


def install(
    site: SiteArgument = None, *, name: NameOption = UNIT, as_json: JsonFlag = False
) -> None:
    """Make the site a service of systemd, which starts with the machine: of the whole machine as root, else of this user.

    Without systemd the unit's text is written into the folder, and the command says what to do with it (exit code 1).
    """
    folder = site_folder(site)
    _, colon, path = folder.settings.site.data.partition(":")
    # What the service has to read outside its folder.
    data = [Path(path)] if colon and Path(path).is_absolute() else []
    what = AsService(
        kind="site",
        folder=folder,
        name=name,
        start="fedsplit site run",
        unit_file=folder.path / f"{name}.service",
        reads=data,
        again="when it ends with another code than 4",
    )
    install_service(what, Output(as_json=as_json))


def uninstall(*, name: NameOption = UNIT, as_json: JsonFlag = False) -> None:
    """End the service and take it away. The site folder stays as it is, and the site a member."""
    uninstall_service(name, "the site folder is as it was", Output(as_json=as_json))
