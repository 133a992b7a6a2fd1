"""What `fedsplit doctor` looks at on a site's machine: its folder, its data, its processes, and the way to the server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx

from fedsplit import __version__
from fedsplit.core.cut import Cut
from fedsplit.core.errors import FedsplitError
from fedsplit.core.foreign import parse_json, printable
from fedsplit.plant import checks, paths
from fedsplit.plant.checks import Check, Look
from fedsplit.plant.site.calls import ControlCalls, open_client
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.listening import listening
from fedsplit.plant.site.services import RUNTIME, SUPERNODE
from fedsplit.plant.site.source import look_at
from fedsplit.plant.site.trust import clock_fault
from fedsplit.plant.wire import Refusal

_PINGS = 5
_MEASURED_S = 0.5
_MAX_REFUSAL_BYTES = 64 << 10
_SLOW_MBIT = 1.0
_FAR_S = 0.3
_NEAR_S = 0.05
_TIMEOUT_S = 10.0


def site_checks(path: Path, *, joining: bool = False) -> Iterable[Check]:
    """All checks of the site folder at `path`. Raises ConfigError for a folder whose settings cannot be read.

    `joining`: the site has just joined, and nobody has started it yet.
    """
    folder = SiteFolder.at(path)
    site = folder.settings.site
    again = f"join again with a new code (on the server: fedsplit federation rotate {site.name})"
    looks: dict[str, Look] = {
        "settings": lambda: Check("settings", "green", f"format 1, site {site.name}, server {site.address}"),
        "disk": lambda: checks.disk(folder.path),
        "memory": checks.memory,
        "processor": checks.processor,
        "secrets": lambda: checks.private([folder.certificate_key, folder.node_key, folder.superexec_secret]),
        "certificate": lambda: checks.certificate("certificate", folder.certificate, folder.certificate_key, folder.ca, cure=again),
        "proxy": lambda: checks.proxies(site.address),
        "server": lambda: _server(folder),
        "membership": lambda: _way(folder, again),
        "data": lambda: _data(folder),
        "backbone": lambda: _backbone(folder),
    }  # fmt: skip
    if not joining:
        start = f"fedsplit site run {folder.path}"
        looks["services"] = lambda: checks.services(
            folder.state, (SUPERNODE, RUNTIME), start=start, logs=folder.logs
        )
    if not joining and folder.settings.serve.port:
        looks["serve"] = lambda: _serve(folder)
    return checks.look_at(looks)


def _serve(folder: SiteFolder) -> Check:
    """Does the runtime answer predictions, and with the module that is meant?"""
    at = listening(folder)
    at.checked()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(at.host, at.host)
    address = replace(at, host=host).address(at.port)
    log = f"see {folder.logs / f'{RUNTIME}.jsonl'}"
    try:
        # It is this machine's own service, whatever name its certificate has.
        answer = httpx.get(f"{address}/health", verify=False, timeout=_TIMEOUT_S, trust_env=False)
        said = parse_json(answer.content, limit=_MAX_REFUSAL_BYTES)
        module, fault, status = said["module"], printable(said["fault"]), said["status"]
        found = f"{address}: {said['answered']} answers, module {printable(module)[:12] or 'none'}"
    except httpx.HTTPError as err:
        return Check("serve", "red", f"{address} does not answer ({printable(err)})", log)
    except (ValueError, KeyError, TypeError):
        return Check("serve", "red", f"{address} is no service of fedsplit", "choose another port")
    if fault:
        return Check("serve", "yellow", f"{found}; a newer one is not in use: {fault}", log)
    if status != "ok":
        return Check(
            "serve",
            "yellow",
            f"{found}",
            "on the server: fedsplit module promote; it comes by itself",
        )
    return Check("serve", "green", found)


def _server(folder: SiteFolder) -> Iterator[Check]:
    """The name, the port, TLS, the clock and the version, in the order in which they stand before each other."""
    address = folder.settings.site.address
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, ValueError) as err:
        yield Check(
            "name", "red", f"{host} has no address here: {getattr(err, 'strerror', None) or err}",
            "enter it into the plant's DNS or /etc/hosts, or correct address in site.toml",
        )  # fmt: skip
        return
    yield Check("name", "green", f"{host} has an address")
    try:
        with ControlCalls(address, folder.ca) as calls:
            hello = calls.hello()
    except FedsplitError as err:
        yield Check(
            "server",
            "red",
            printable(err, limit=1000),
            "check the server (there: fedsplit doctor), cable and firewall",
        )
        return
    yield Check("server", "green", f"{address} answers, and is the one that the site joined")
    if fault := clock_fault(hello.server_time):
        yield Check(
            "clock", "red", fault, "set this machine's clock, e.g. timedatectl set-ntp true"
        )
    else:
        yield Check(
            "clock", "green", f"{abs(time.time() - hello.server_time):.0f} s from the server's"
        )
    if hello.fedsplit_version != __version__:
        yield Check(
            "versions",
            "red",
            f"fedsplit {__version__} here, {hello.fedsplit_version} at the server",
            "install the same on both",
        )
    else:
        yield Check("versions", "green", f"fedsplit {__version__} on both sides")


def _way(folder: SiteFolder, again: str) -> Iterator[Check]:
    """How the site stands with the server, and round trip and throughput of the port that activations take too."""
    try:
        with open_client(folder, timeout_s=_TIMEOUT_S) as client:
            refused = _refusal(client)
            if refused:
                yield Check("membership", "red", refused, again)
                return
            yield Check("membership", "green", "the server knows this site")
            yield _measured(client)
    except httpx.HTTPError as err:
        said = f"not looked at: {printable(err, limit=300)}"
        yield Check("membership", "red", said, "see the lines on the server above")


def _refusal(client: httpx.Client) -> str:
    """Why the server gives this site nothing; empty where it does. What is asked for changes nothing there."""
    with client.stream("GET", paths.MANIFEST) as answer:
        if answer.status_code < 400:
            return ""
        body = answer.read()[:_MAX_REFUSAL_BYTES]
    try:
        return printable(Refusal.model_validate(parse_json(body)["error"]).message, limit=1000)
    except (ValueError, KeyError, TypeError):
        return f"the server answers {answer.status_code}"


def _measured(client: httpx.Client) -> Check:
    trips = []
    for _ in range(_PINGS):
        began = time.monotonic()
        client.get(paths.HELLO)
        trips.append(time.monotonic() - began)
    began, received = time.monotonic(), 0
    while (took := time.monotonic() - began) < _MEASURED_S:
        with client.stream("GET", paths.MANIFEST) as answer:
            for piece in answer.iter_raw():
                received += len(piece)
    trip, mbit = min(trips), 8 * received / took / 1e6
    found = f"round trip {1000 * trip:.0f} ms, at least {mbit:.1f} Mbit/s down"
    # Of a little much is round trips.
    if trip > _FAR_S or (mbit < _SLOW_MBIT and trip < _NEAR_S):
        return Check(
            "line",
            "yellow",
            found,
            "it works, slowly: choose a cut without a server part (a,a), or raise deadline-s",
        )
    return Check("line", "green", found)


def _data(folder: SiteFolder) -> Check:
    """Read the data by the rules of training."""
    seen = look_at(folder.settings)
    notes = f". {' '.join(printable(note) for note in seen.notes[:3])}" if seen.notes else ""
    return Check(
        "data",
        "yellow" if seen.notes else "green",
        f"{seen}{notes}",
        "read docs/how-to/own-data.md on what it says" if seen.notes else "",
    )


def _backbone(folder: SiteFolder) -> Check:
    """Is what the site fetched there, and what it was?"""
    from fedsplit.model.backbone import Backbone
    from fedsplit.model.store import BackboneStore

    wanted = folder.settings.site.backbone_sha256
    if not wanted:
        return Check("backbone", "green", "none was fetched; a run's own is looked for by its name")
    store = BackboneStore(folder.backbones)
    found = store.find(wanted)
    fetch = f"fedsplit site fetch {folder.path}"
    if found is None:
        return Check("backbone", "red", f"digest {wanted[:12]} is not in {folder.backbones}", fetch)
    backbone = Backbone.find(str(found))
    if backbone.sha256 != wanted:
        return Check(
            "backbone",
            "red",
            f"{found} has digest {backbone.sha256[:12]}, {wanted[:12]} is wanted",
            fetch,
        )
    cut = folder.settings.site.cut
    lacking = store.missing(backbone.manifest, Cut.parse(cut)) if cut else []
    if lacking:
        size = sum(tensor.bytes for tensor in lacking) / 1e6
        told = f"{size:,.1f} MB that cut {cut} needs are not here yet; the first run brings them"
        return Check("backbone", "yellow", told, f"{fetch} brings them now")
    return Check(
        "backbone", "green", f"digest {wanted[:12]}, {store.total_bytes() / 1e6:,.0f} MB on disk"
    )
