"""Tells the server every few seconds how the site is, hears how it stands, and says both to the site's own people.

What a SuperNode says when it is refused is the same for a site that was revoked, one with a wrong clock and one whose
last SuperNode was killed a moment ago: the control service knows which, so it is asked as soon as a SuperNode ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import psutil

from fedsplit import __version__
from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, NotMemberError, PlantError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.versions import installed
from fedsplit.core.whole_files import free_bytes
from fedsplit.plant.site import keys
from fedsplit.plant.site.calls import ControlCalls
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.modules import SiteModules
from fedsplit.plant.site.services import RUNTIME, SUPERNODE
from fedsplit.plant.site.source_paths import gone
from fedsplit.plant.site.trust import clock_fault
from fedsplit.plant.site.usage import bounded, last_days
from fedsplit.plant.wire import Report, ReportAnswer, SiteState

EVERY_S = 10.0
AWAY_EVERY_S = 30.0
"""How often a server that does not answer is asked."""
_STATES: tuple[SiteState, ...] = ("starting", "idle", "working", "stopping", "failing")
_DOUBLED_S = 60.0
"""So long does a SuperLink hold a node's place after its SuperNode was killed."""


class Reports(Closing):
    """The site's reports. `step` sends what is due; `ended` says why the site must stop, once it must."""

    def __init__(
        self,
        folder: SiteFolder,
        *,
        services: Callable[[], dict[str, Any]],
        say: Callable[[str], None],
        modules: SiteModules | None = None,
    ) -> None:
        """`services`: the supervisor's state of each, by name. `modules` hears what is in production."""
        self._folder, self._services, self._say, self._modules = folder, services, say, modules
        self._calls: ControlCalls | None = None
        self._opened = 0
        self._due = 0.0
        self._exit: Any = None
        self._away = ""
        self._explained = 0.0
        self._shown: tuple[str, str] | None = None
        self._clock = ""
        self.ended: NotMemberError | None = None
        self.was_ready = False

    @property
    def idle(self) -> bool:
        """Is the site ready and without an order?"""
        return self._shown is not None and self._shown[0] == "idle"

    def close(self) -> None:
        """End the connection."""
        if self._calls is not None:
            self._calls.close()
            self._calls = None

    def step(self) -> float:
        """Report if it is time. Gives the seconds until the next look."""
        found = self._services()
        told = self._report(found)
        self._show(told)
        left = found.get(SUPERNODE, {}).get("last_exit")
        if asked := left != self._exit:
            self._exit = left
        if (asked or time.monotonic() >= self._due) and self.ended is None:
            self._due = time.monotonic() + (EVERY_S if self._send(told, asked) else AWAY_EVERY_S)
        return 1.0

    def _send(self, told: Report, asked: bool) -> bool:
        """Send one; `asked`: because the SuperNode ended. True where the server answered."""
        try:
            answer = self._line().report(self._with_module(told))
        except NotMemberError as err:
            self.ended = err
        except (PlantError, ConfigError) as err:
            self.close()
            if str(err) != self._away:
                self._away = str(err)
                self._say(f"{err}; the site waits and tries again")
            return False
        else:
            self._heard(answer, asked)
        return True

    def _heard(self, answer: ReportAnswer, asked: bool) -> None:
        if self._away:
            self._away = ""
            self._say("the server answers again")
        if answer.standing != "member":
            self.ended = NotMemberError(answer.message or f"this site was {answer.standing}")
            return
        keys.forget_old(self._folder.path)
        if self._modules is not None:
            self._modules.hear(answer.modules)
        fault = clock_fault(answer.server_time)
        if fault and not self._clock:
            self._say(f"{fault}. Until then the server refuses this site")
        self._clock = fault
        if asked and not fault and time.monotonic() > self._explained:
            # Once, however often it is refused in that time.
            self._explained = time.monotonic() + 2 * _DOUBLED_S
            self._say(
                f"the SuperNode ended, and the site is a member as before: it is started again. After one was killed the "
                f"server holds its place for up to {_DOUBLED_S:g} s and refuses the next one meanwhile"
            )

    def _with_module(self, told: Report) -> Report:
        """The report with the module that is in use, and what it has answered of late."""
        if self._modules is None or (module := self._modules.state()) is None:
            return told
        usage = last_days(self._folder, module.digest)
        return bounded(told.model_copy(update={"module": module, "usage": usage}))

    def _line(self) -> ControlCalls:
        """The connection, with the certificate that is in force now."""
        changed = self._folder.certificate.stat().st_mtime_ns
        if self._calls is None or changed != self._opened:
            self.close()
            pair = (self._folder.certificate, self._folder.certificate_key)
            self._calls = ControlCalls(self._folder.settings.site.address, self._folder.ca, pair)
            self._opened = changed
        return self._calls

    def _report(self, services: dict[str, Any]) -> Report:
        doing = self._doing(services)
        state, detail = _state(services, doing)
        if fault := gone(self._folder.settings.site.data):
            state, detail = "failing", f"the data: {fault}"
        if self._clock:
            state, detail = "failing", self._clock
        ends = 0.0
        with contextlib.suppress(ConfigError):
            ends = keys.ends(keys.certificate(self._folder))
        loads = doing.get("backbone_loads", 0)
        return Report(
            state=state,
            detail=printable(detail, limit=500),
            fedsplit_version=__version__,
            versions=installed(),
            backbone_loads=loads if isinstance(loads, int) and loads >= 0 else 0,
            rss_bytes=_rss(services),
            disk_free_bytes=free_bytes(self._folder.path),
            certificate_ends=ends,
            task=self._folder.settings.site.task,
        )

    def _doing(self, services: dict[str, Any]) -> dict[str, Any]:
        """What the runtime says of itself; nothing before its first word."""
        try:
            found = read_json(self._folder.doing, limit=1 << 16)
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict):
            return {}
        # Else it is the last word of one that has ended.
        ours = found.get("pid") == services.get(RUNTIME, {}).get("pid")
        return found if ours else {}

    def _show(self, told: Report) -> None:
        """Say what has changed, and once that the site is ready."""
        now = (told.state, told.detail)
        if now == self._shown:
            return
        self._shown = now
        self._say(told.state + (f": {told.detail}" if told.detail else ""))
        self.was_ready = self.was_ready or told.state in ("idle", "working")


def _state(services: dict[str, Any], doing: dict[str, Any]) -> tuple[SiteState, str]:
    """Of both services as one."""
    for name in (SUPERNODE, RUNTIME):
        service = services.get(name, {})
        if service.get("state") == "down" and (left := service.get("last_exit")):
            why = left.get("why", "") if isinstance(left, dict) else ""
            return "failing", f"{name} {why}; it is started again"
        if service.get("state") != "up":
            return "starting", ""
    state: SiteState = next((s for s in _STATES if s == doing.get("state")), "starting")
    return state, str(doing.get("detail", "") or "") or served(doing)


def served(doing: dict[str, Any]) -> str:
    """What the runtime serves, in words; empty where it is not to serve."""
    said = doing.get("serve")
    if not isinstance(said, dict):
        return ""
    if fault := said.get("fault"):
        return f"it serves {'as before' if said.get('module') else 'nothing'}: {fault}"
    module = str(said.get("module", ""))[:12]
    return f"serves {f'module {module}' if module else 'no module yet'} at {said.get('address')}"


def _rss(services: dict[str, Any]) -> int:
    """Bytes of the site's processes."""
    found = psutil.Process().memory_info().rss
    for service in services.values():
        with contextlib.suppress(psutil.Error, TypeError, ValueError):
            found += psutil.Process(service["pid"]).memory_info().rss if service["pid"] else 0
    return int(found)
