"""What Flower's commands say when a SuperLink cannot be used, in words that name the cause and the cure.

Flower tells a refused login, a wrong address, a closed tunnel and a proxy in the way by three short
texts. Asks nothing of anybody.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError, FederationError, FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.proxies import proxy_variable

CLOCKS = "A clock that is 5 s ahead of the server's, or 5 minutes behind, is refused too. Keep both clocks right by NTP"
_STATUS = re.compile(r"\berror '(\d{3}) ")


@dataclass(frozen=True, slots=True)
class SuperLink:
    """A connection of Flower's configuration file."""

    name: str
    address: str
    """HOST:PORT; empty where the file does not say."""
    file: Path
    names: tuple[str, ...]
    """All connections there."""
    proxy: str = ""
    """Name of the variable by which a proxy stands between here and the address; empty: none does."""

    def __str__(self) -> str:
        return f"{self.name!r} at {self.address}" if self.address else repr(self.name)


def superlink_of(name: str, env: Mapping[str, str]) -> SuperLink:
    """What Flower's configuration says of a connection; what cannot be read is left empty."""
    file = Path(env.get("FLWR_HOME") or Path.home() / ".flwr") / "config.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("superlink", {})
    except (OSError, ValueError):
        table = {}
    found = {k: v for k, v in table.items() if isinstance(v, dict)}
    address = str(found.get(name, {}).get("address", ""))
    return SuperLink(name, address, file, tuple(found), proxy_variable(address, env))


def in_words(command: str, said: str, link: SuperLink) -> FedsplitError:
    """The error for what `flwr COMMAND` said. ConfigError where the connection's name is wrong."""
    if "not found in the Flower configuration file" in said:
        there = f"it has {', '.join(link.names)}" if link.names else "it has none yet"
        return ConfigError(
            f"--superlink {link.name}: Flower's configuration {link.file} has no connection of that name; {there}. "
            f"Give one of those, or add a table [superlink.{link.name}] with its address"
        )
    words = _cause(said, link)
    # The last part is the reason; what comes before says what Flower was about to do.
    reason = said.split("\n\n")[-1]
    if words:
        return FederationError(f"{words} (`flwr {command}` said: {printable(reason, limit=200)})")
    return FederationError(f"`flwr {command}` failed: {reason}")


def _cause(said: str, link: SuperLink) -> str:
    status = _STATUS.search(said)
    code = status.group(1) if status else ""
    proxy = f" {link.proxy} catches this address: add its host to no_proxy." if link.proxy else ""
    if "Authentication failed" in said or code == "401":
        return (
            f"the SuperLink {link} answered 401: it does not know who asks. If it wants a login, run "
            f"`flwr login {link.name}`. If a proxy in front of it wants one, start runs on the SuperLink's own machine. "
            f"A SuperNode that gets this answer ends by itself with exit code 0. If the SuperLink was restarted without "
            f"--database, start each SuperNode again. {CLOCKS}.{proxy}"
        )
    if "Connection to the SuperLink is unavailable" in said:
        return (
            f"no SuperLink answers at {link.address or link.name}. Does flower-superlink run there? Is the tunnel open? "
            f"Do `insecure` and `root-certificates` in {link.file} match its own options?{proxy}"
        )
    if code == "403":
        return (
            f"the SuperLink {link} answered 403: this user may not do that. A proxy for SuperNodes forwards only "
            f"/v1/fleet/, so start runs on the SuperLink's own machine.{proxy}"
        )
    if code == "404" or "Invalid protobuf response" in said:
        return (
            f"what answers at {link.address} is no SuperLink: it does not know Flower's Control API. Check the "
            f"`address` in {link.file}, and that both machines have the same version of flwr.{proxy}"
        )
    if code in {"407", "502", "503", "504"}:
        return f"a proxy answers {code} at {link.address}, and no SuperLink behind it. Does flower-superlink run there?{proxy}"
    return ""
