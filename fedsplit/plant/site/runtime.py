"""`python -m fedsplit.plant.site.runtime`: a site's resident runtime, the process that holds torch, model and data for years.

`site run` starts it beside a SuperNode with the site folder as its one argument; `fedsplit site executor` is the same for
whoever has no site folder. It warms up, so that the first round is a warm one too, then carries out what the SuperNode
brings (federation/executor.py), and writes what it does to `run/runtime.json`.
SIGTERM ends it within 5 s, also in the middle of a step: the run is told.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from fedsplit import __version__
from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, FedsplitError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.whole_files import write_whole
from fedsplit.federation.executor import Doing, Executor, runs_of
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.services import node_config
from fedsplit.plant.supervisor import stop_on_signals
from fedsplit.site.runtime import SiteRuntime
from fedsplit.training.site_settings import NodeConfig, SiteSettings

if TYPE_CHECKING:
    from fedsplit.plant.site.serving import SiteServing

log = logging.getLogger(__name__)

# A step gets so long to end after SIGTERM; then the order is abandoned, and the run told of it.
_STEP_S, _TELL_S = 3.0, 1.0
_WRITE_EVERY_S = 2.0
# Longer than any step, and than a machine without memory stands still.
_HANG_S = 300.0
_MAX_STATE_BYTES = 1 << 20
_STDERR = 2


@dataclass(frozen=True)
class Place:
    """What a resident runtime is told of where it runs."""

    supernode: str
    """HOST:PORT of the SuperNode's Runtime API."""
    secret_file: Path
    doing: Path | None = None
    """Where to write what it does."""
    note: Path | None = None
    """Where to note the order at hand: see Executor."""
    superlink: str = ""
    node_key: Path | None = None
    ca: Path | None = None
    """With these three it asks the SuperLink whether a run is over."""
    site: SiteFolder | None = None
    """What it loads before the first order; None: code alone."""

    @classmethod
    def of(cls, folder: SiteFolder) -> Place:
        """That of a site folder whose supervisor runs. Raises ConfigError."""
        return cls(
            supernode=f"127.0.0.1:{_port(folder)}",
            secret_file=folder.superexec_secret,
            doing=folder.doing,
            note=folder.present / "order",
            superlink=folder.settings.site.address,
            node_key=folder.node_key,
            ca=folder.ca,
            site=folder,
        )


def resident(place: Place, stop: threading.Event, runtime: SiteRuntime | None = None) -> bool:
    """Carry out orders until `stop` is set; False where a step had to be left in its middle. Raises ConfigError."""
    runtime = runtime or _runtime(place.site)
    failed: list[BaseException] = []
    with ExitStack() as stack:
        over = None
        if place.node_key is not None:
            over = stack.enter_context(runs_of(place.superlink, place.node_key, place.ca)).over
        executor = stack.enter_context(
            Executor(
                place.supernode, _secret(place.secret_file), runtime, note=place.note, over=over
            )
        )
        serving = _serving(place.site, runtime)
        told = stack.enter_context(_Told(place.doing, executor, runtime, serving))

        def work() -> None:
            try:
                executor.tell_of_the_dead()
                warm_up(runtime, place.site)
                executor.run(stop)
            except BaseException as err:  # noqa: BLE001 - raised again in the main thread
                failed.append(err)
            finally:
                stop.set()

        # The main thread stays free for signals, however long an operation of torch takes.
        worker = threading.Thread(target=work, name="orders", daemon=True)
        worker.start()
        with unless_it_hangs() as alive:
            while not stop.wait(_WRITE_EVERY_S):
                if serving is not None:
                    serving.tend()
                told.write()
                alive(executor.told)
        told.write(stopping=True)
        # Beside the end of the step, for both have the same few seconds.
        ending = threading.Thread(target=serving.close if serving else int, daemon=True)
        ending.start()
        worker.join(_STEP_S)
        if ended := not worker.is_alive():
            told.write(stopping=True)
        else:
            teller = threading.Thread(target=executor.abandon, name="abandon", daemon=True)
            teller.start()
            teller.join(_TELL_S)
            stack.pop_all()  # the step uses what would be closed
        ending.join(_TELL_S)
    if failed:
        raise failed[0]
    return ended


@contextmanager
def unless_it_hangs(limit_s: float = _HANG_S) -> Iterator[Callable[[Doing], None]]:
    """End the process, with the stacks of its threads, when nothing calls what this yields for `limit_s`.

    Python may be held by an operation that never returns. What is yielded also looks at the order: a step that goes on for
    so long after its time is over will not end. The supervisor starts the process again, and the run is told then.
    """

    def alive(doing: Doing) -> None:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=_STDERR)
        late_s = time.time() - doing.until
        if doing.until and late_s > limit_s:
            log.error(
                "%s: not left %.0f s after its time was over; the runtime ends",
                doing.detail,
                late_s,
            )
            faulthandler.dump_traceback(file=_STDERR)
            logging.shutdown()
            os._exit(1)

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def _serving(folder: SiteFolder | None, runtime: SiteRuntime) -> SiteServing | None:
    """What answers predictions beside the orders, where site.toml wants that."""
    if folder is None or not folder.settings.serve.port:
        return None
    from fedsplit.plant.site.serving import SiteServing

    return SiteServing(folder, runtime)


def _runtime(folder: SiteFolder | None) -> SiteRuntime:
    fetch = None
    if folder is not None:
        from fedsplit.plant.site.fetch import of_site

        fetch = of_site(folder)
    return SiteRuntime(log=logging.getLogger("fedsplit.site"), fetch=fetch)


def warm_up(runtime: SiteRuntime, folder: SiteFolder | None) -> None:
    """Load what the first order would wait for: code, and with a site folder the backbone's part and the data."""
    try:
        node: NodeConfig = node_config(folder) if folder else {}
        site = SiteSettings.from_node(node, node_id=0)
        sha256 = folder.settings.site.backbone_sha256 if folder else ""
    except ConfigError as err:
        log.warning("nothing is loaded before the first order: %s", err)
        return
    runtime.warm(site, sha256=sha256)


class _Told(Closing):
    """Keeps a file with what the runtime does, whole at any time."""

    def __init__(
        self,
        path: Path | None,
        executor: Executor,
        runtime: SiteRuntime,
        serving: SiteServing | None = None,
    ) -> None:
        self._path, self._executor, self._runtime = path, executor, runtime
        self._serving = serving
        self._fault = ""
        self.write()

    def write(self, *, stopping: bool = False) -> None:
        """Bring it up to date. A full disk costs the file, not the work."""
        if self._path is None:
            return
        doing: Doing = self._executor.told
        found = asdict(doing) | {
            "pid": os.getpid(),
            "fedsplit_version": __version__,
            "rss_bytes": psutil.Process().memory_info().rss,
            "backbone_loads": self._runtime.kept.parts.loads,
            "written": time.time(),
        }
        if self._serving is not None:
            found["serve"] = self._serving.told
        if stopping:
            found["state"] = "stopping"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._path, json.dumps(found, indent=1) + "\n")
            self._fault = ""
        except OSError as err:
            if str(err) != self._fault:
                self._fault = str(err)
                log.warning("%s cannot be written: %s", self._path, err.strerror)

    def close(self) -> None:
        """Nothing is held."""


def _secret(path: Path) -> bytes:
    # As it stands, white space and all: flower-supernode reads its file so.
    try:
        secret = path.expanduser().read_bytes()
    except OSError as err:
        raise ConfigError(
            f"the executor's secret {path} cannot be read ({err.strerror}); give the file that flower-supernode has as "
            f"--superexec-auth-secret-file"
        ) from err
    if not secret:
        raise ConfigError(f"the executor's secret {path} is empty; put random bytes into it")
    return secret


def _port(folder: SiteFolder) -> int:
    """The SuperNode's, as the supervisor chose it."""
    try:
        port = read_json(folder.state, limit=_MAX_STATE_BYTES)["services"]["supernode"]["port"]
    except (OSError, ValueError, KeyError, TypeError):
        port = None
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ConfigError(
            f"{printable(folder.state)} names no SuperNode; `fedsplit site run {printable(folder.path)}` starts both, the "
            f"SuperNode and this runtime"
        )
    return port


def serve(place: Callable[[], Place]) -> NoReturn:
    """The whole process: carry out orders until a signal, and end. `place` is asked first. Raises FedsplitError."""
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # A line for each look at the SuperNode, five a second.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    with stop_on_signals(stop):
        resident(place(), stop)
    logging.shutdown()
    # The interpreter would wait for a step that does not end, and take its time with torch.
    os._exit(0)


def main(argv: list[str] | None = None) -> int:
    """The process of a site folder; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedsplit.plant.site.runtime",
        description="A site's resident runtime. `fedsplit site run` starts it; without a site folder: fedsplit site executor.",
    )
    parser.add_argument("site", type=Path, metavar="SITE", help="a site folder")
    args = parser.parse_args(argv)
    try:
        serve(lambda: Place.of(SiteFolder.at(args.site)))
    except FedsplitError as err:
        log.error("%s: %s", type(err).__name__, err)
        return 2 if isinstance(err, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
