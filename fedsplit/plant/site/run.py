"""`site run`: keeps a site up for years. A light parent, without torch: two services, and threads for all else.

Checks before anything starts what would only fail later. Ends by itself, with the reason, when the site is no member any
more; waits as long as it takes for a server that is away.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedsplit import __version__
from fedsplit.core.errors import DataError, FolderError, NotMemberError, PlantError
from fedsplit.core.foreign import printable
from fedsplit.plant.service import Service
from fedsplit.plant.site import keys
from fedsplit.plant.site.calls import ControlCalls
from fedsplit.plant.site.clean import keep_bounded
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.listening import listening
from fedsplit.plant.site.modules import SiteModules
from fedsplit.plant.site.renew import Renewals
from fedsplit.plant.site.report import Reports
from fedsplit.plant.site.services import services
from fedsplit.plant.site.source_paths import gone
from fedsplit.plant.site.trust import check_clock
from fedsplit.plant.supervisor import Supervisor
from fedsplit.plant.wire import Report

log = logging.getLogger(__name__)

_CLEAN_EVERY_S = 24 * 3600.0
_ASK_S = 5.0
_JOIN_S = 1.5
Say = Callable[[str], None]


def run(folder: SiteFolder, stop: threading.Event, *, say: Say, ready: Callable[[], None]) -> None:
    """Keep the site up until `stop` is set. `ready` is called once, when it takes its first orders.

    Raises ConfigError, DataError, ServiceError before anything has started, and NotMemberError also later.
    """

    def checked() -> list[Service]:
        # First: it may make the room that the rest needs.
        keep_bounded(folder, say)
        check(folder, say)
        try:
            return services(folder)
        except OSError as err:
            raise _unwritable(folder, err) from err

    most = folder.settings.retention.log_mb
    with (
        Supervisor(checked, state_file=folder.state, say=say, log_mb=most) as supervisor,
        SiteModules(folder, say=say, idle=lambda: reports.idle) as modules,
        Reports(
            folder, services=lambda: supervisor.state()["services"], say=say, modules=modules
        ) as reports,
    ):
        renewals = Renewals(folder, say=say)

        def report() -> float:
            wait = reports.step()
            if reports.was_ready:
                once.set()
            if reports.ended is not None:
                stop.set()
            return wait

        def clean() -> float:
            keep_bounded(folder, say)
            return _CLEAN_EVERY_S

        once = _Once(ready)
        threads = [
            threading.Thread(target=_again_and_again, args=[step, wait, stop, say], daemon=True)
            for step, wait in (
                (report, 0.0),
                (renewals.step, 0.0),
                (modules.step, 1.0),
                (clean, _CLEAN_EVERY_S),
            )
        ]
        for thread in threads:
            thread.start()
        try:
            supervisor.run(stop)
        finally:
            stop.set()
            # One that waits for a server that is away is left behind: nothing is lost by it.
            for thread in threads:
                thread.join(_JOIN_S / len(threads))
    if reports.ended is not None:
        raise _put_out(folder, str(reports.ended))


def check(folder: SiteFolder, say: Say) -> None:
    """What would only fail later. Raises ConfigError, DataError, FolderError, NotMemberError."""
    try:
        keys.repaired(folder)
    except OSError as err:
        raise _unwritable(folder, err) from err
    ends = keys.ends(keys.certificate(folder))
    site = folder.settings.site
    if folder.settings.serve.port:
        listening(folder).checked()
    if fault := gone(site.data):
        raise DataError(
            f"site {site.name!r}: {fault}; correct data in {printable(folder.path / 'site.toml')}, or bring the folder back"
        )
    try:
        _ask(folder, ends, say)
    except NotMemberError as err:
        raise _put_out(folder, str(err)) from err
    except PlantError as err:
        if ends < time.time():
            raise _put_out(folder, _over(ends)) from err
        say(f"{err}; the site starts all the same and waits")


def _ask(folder: SiteFolder, ends: float, say: Say) -> None:
    """Ask the server how the site stands. Raises ConfigError for a clock that it would refuse, and PlantError."""
    site = folder.settings.site
    pair = (folder.certificate, folder.certificate_key)
    with ControlCalls(site.address, folder.ca, pair, timeout_s=_ASK_S) as calls:
        hello = calls.hello()
        check_clock(hello)
        if ends < time.time():
            raise NotMemberError(_over(ends))
        if hello.fedsplit_version != __version__:
            say(
                f"the server has fedsplit {printable(hello.fedsplit_version, limit=40)}, this site {__version__}: runs leave "
                f"the site out until both have the same"
            )
        answer = calls.report(
            Report(state="starting", fedsplit_version=__version__, task=site.task)
        )
    if answer.standing != "member":
        raise NotMemberError(answer.message or f"it was {answer.standing}")


def _unwritable(folder: SiteFolder, err: OSError) -> FolderError:
    return FolderError(
        f"{printable(err.filename or folder.path)} cannot be written ({err.strerror}); free some space, or correct the rights "
        f"of {printable(folder.path)}"
    )


def _put_out(folder: SiteFolder, why: str) -> NotMemberError:
    site = folder.settings.site
    return NotMemberError(
        f"site {site.name!r} is no member of the federation at {site.address} any more: {why}. It is stopped. To come back "
        f"it joins again with a new code: fedsplit site join CODE --dir {quoted(folder.path)}"
    )


def quoted(path: Path) -> str:
    """A path as it is typed in a shell."""
    return printable(shlex.quote(str(path)))


def _over(ends: float) -> str:
    return f"its certificate was over on {keys.day(ends)} (a new code, on the server: fedsplit federation rotate)"


class _Once:
    """Calls what it was given at its first `set`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def set(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def _again_and_again(
    step: Callable[[], float], wait: float, stop: threading.Event, say: Say
) -> None:
    while not stop.wait(wait):
        try:
            wait = step()
        except Exception as err:
            if stop.is_set():
                return
            log.exception("a step failed")
            say(f"{type(err).__name__}: {printable(err)}; it is tried again in a minute")
            wait = 60.0
