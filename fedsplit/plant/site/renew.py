"""Renews a site's certificate when a third of its life is left: a new key, a new certificate, both in force at once.

The old pair is in force until its end, so an answer that is lost or a disk that is full costs nothing but a later try.
Whoever opens a connection reads the pair then; what is open stays open.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fedsplit.core.errors import ConfigError, PlantError, ServerRefusalError
from fedsplit.core.names import certificate_name
from fedsplit.plant import pki
from fedsplit.plant.site import keys
from fedsplit.plant.site.calls import ControlCalls
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.wire import RenewRequest

LEFT = 1 / 3
"""Of its life, when a certificate is renewed."""
FIRST_TRY_S, LAST_TRY_S = 60.0, 3600.0
"""Seconds between tries that fail: the first, and in the end."""
_LOOK_S = 3600.0
_TELL_S = 24 * 3600.0


class Renewals:
    """Keeps one site's certificate in force."""

    def __init__(self, folder: SiteFolder, *, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._wait_s = FIRST_TRY_S
        self._told = 0.0

    def step(self) -> float:
        """Renew if it is time. Gives the seconds until the next look."""
        left = self._due_in()
        if left > 0:
            return min(left, _LOOK_S)
        try:
            renew(self._folder)
        except (PlantError, ConfigError, OSError) as err:
            self._tell(err)
            wait, self._wait_s = self._wait_s, min(2 * self._wait_s, LAST_TRY_S)
            return wait
        self._wait_s, self._told = FIRST_TRY_S, 0.0
        self._say(f"the site's certificate is renewed, until {keys.day(self._ends())}")
        return FIRST_TRY_S

    def _due_in(self) -> float:
        found = keys.certificate(self._folder)
        start, end = found.not_valid_before_utc.timestamp(), keys.ends(found)
        return end - LEFT * (end - start) - time.time()

    def _ends(self) -> float:
        return keys.ends(keys.certificate(self._folder))

    def _tell(self, err: Exception) -> None:
        """At once, then once a day, and at every try of the last day: a person has to have the time to do something."""
        left = self._ends() - time.time()
        if left > _TELL_S and time.monotonic() < self._told:
            return
        self._told = time.monotonic() + _TELL_S
        word = f"is over in {left / 86400:.1f} days" if left > 0 else "is over"
        self._say(
            f"the site's certificate {word} ({keys.day(self._ends())}) and cannot be renewed: {err}. It is tried again; "
            f"after its end the site has to join again with a new code"
        )


def renew(folder: SiteFolder) -> None:
    """Get the next pair and put it in force. Raises PlantError, ConfigError, OSError; the present pair stays then."""
    key = keys.next_key(folder)
    request = pki.csr(key, certificate_name(folder.settings.site.name)).decode("ascii")
    pair = (folder.certificate, folder.certificate_key)
    with ControlCalls(folder.settings.site.address, folder.ca, pair) as calls:
        try:
            answer = calls.renew(RenewRequest(csr=request))
        except ServerRefusalError:
            # It may be the key that is refused, as one that was in force before: the next try makes another.
            keys.forget_next(folder)
            raise
    keys.take_next(folder, answer.certificate)
