"""Measure what an install takes on disk and what a server and a site take in memory when they wait; write docs/reference/sizes.md.

    make sizes                         some minutes: makes an environment, a server and a site in a temporary folder
    python scripts/sizes.py --index URL    look for packages there too, e.g. PyTorch's builds without CUDA

Installs by pip's own settings, at the versions of constraints.txt. Needs nginx.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from fedsplit.core.programs import flower_environment, free_port
from fedsplit.plant.own_wheel import own_wheel

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "sizes.md"
MB = 1_000_000
SETTLE_S = 30.0
"""After it is ready, until it only waits."""
LARGEST = 10
INSTALLS = (("", "a site"), ("[server]", "a server"), ("[server,simulation]", "everything"))


@dataclass(frozen=True)
class Memory:
    """One service that waits."""

    where: str
    service: str
    processes: int
    rss: int
    pss: int
    """As rss, but what processes share is divided among them."""


def install(python: Path, wheel: Path, extra: str, indexes: list[str]) -> None:
    """Put fedsplit with an extra into an environment that has no pip of its own."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]  # fmt: skip
    for url in indexes:
        command += ["--extra-index-url", url]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), f"{wheel}{extra}"], check=True)


def bytes_below(folder: Path) -> int:
    """Bytes of all files, as their disk blocks count."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if not p.is_dir())


def largest(home: Path) -> list[tuple[str, int]]:
    """The packages that take most, as they are installed."""
    (site,) = home.glob("lib/python*/site-packages")
    found = {}
    for dist in importlib.metadata.distributions(path=[str(site)]):
        files = (Path(str(dist.locate_file(f))) for f in dist.files or [])
        found[dist.metadata["Name"]] = sum(f.lstat().st_size for f in files if f.is_file())
    return sorted(found.items(), key=lambda pair: -pair[1])[:LARGEST]


@contextmanager
def running(command: list[str], cwd: Path, env: dict[str, str], ready: str) -> Iterator[None]:
    """A command that says `ready` on one of its lines, and is ended as a person would."""
    log = cwd / "said"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=out)
        try:
            end = time.monotonic() + 300
            while ready not in log.read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)}: {log.read_text(errors='replace')}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(30)


def memory_of(where: str, state_file: Path) -> list[Memory]:
    """What each service of a supervisor takes now, with its children, and the supervisor itself."""
    state = json.loads(state_file.read_text(encoding="utf-8"))
    services = {name: psutil.Process(one["pid"]) for name, one in state["services"].items()}
    found = []
    own = psutil.Process(state["pid"])
    of_services: set[psutil.Process] = set()
    for name, process in services.items():
        tree = [process, *process.children(recursive=True)]
        of_services |= set(tree)
        found.append(_taken(where, name, tree))
    rest = [own, *(p for p in own.children(recursive=True) if p not in of_services)]
    return [*found, _taken(where, "supervisor", rest)]


def _taken(where: str, service: str, tree: list[psutil.Process]) -> Memory:
    full = [p.memory_full_info() for p in tree]
    return Memory(where, service, len(tree), sum(m.rss for m in full), sum(m.pss for m in full))


def idle(home: Path, root: Path) -> list[Memory]:
    """A server and a site with the bundled backbone, when nothing is to be done."""
    env = flower_environment() | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
    fedsplit = str(home / "bin" / "fedsplit")

    def do(*words: str) -> str:
        done = subprocess.run([fedsplit, *words], cwd=root, env=env, capture_output=True, text=True, check=False)  # fmt: skip
        if done.returncode:
            raise SystemExit(f"fedsplit {' '.join(words)}: {done.stderr}")
        return done.stdout

    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = root / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    do("server", "init", "federation", "--host", "localhost", "--port", str(free_port()))
    with running([fedsplit, "server", "up", "federation"], root, env, "the server is up"):
        code = do("federation", "add-site", "line-a", "--federation", "federation").split()[-1]
        do("site", "join", code, "--dir", "site", "--data", "folder:data", "--task", "parts")
        (root / "line").mkdir()
        with running([fedsplit, "site", "run", str(root / "site")], root / "line", env, "is ready"):
            time.sleep(SETTLE_S)
            return [
                *memory_of("site", root / "site" / "run" / "state.json"),
                *memory_of("server", root / "federation" / "run" / "state.json"),
            ]


def page(sizes: list[tuple[str, str, int]], packages: list[tuple[str, int]], memory: list[Memory]) -> str:  # fmt: skip
    """The whole page."""
    torch = importlib.metadata.version("torch")
    lines = [
        "# Sizes",
        "",
        "Measured by `make sizes`; do not edit this page by hand. "
        f"Machine: {platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch}.",
        "",
        "## On disk",
        "",
        "The environment without pip and without what runs leave. PyTorch's builds with CUDA take gigabytes more;",
        "[install without a network](../how-to/air-gapped.md) says how to leave them out.",
        "",
        "| for | install | MB |",
        "|---|---|---:|",
        *(f"| {what} | `fedsplit{extra}` | {size / MB:,.0f} |" for extra, what, size in sizes),
        "",
        "The largest packages of a site:",
        "",
        "| package | MB |",
        "|---|---:|",
        *(f"| {name} | {size / MB:,.0f} |" for name, size in packages),
        "",
        "## In memory, when nothing is to be done",
        "",
        f"A server and a site with the bundled backbone, {SETTLE_S:.0f} s after both were ready. RSS counts what processes share",
        "(libraries, mostly) once for each; PSS divides it among them. A larger backbone adds its tensors: on the server",
        "those of all blocks, on a site those of its cut.",
        "",
        "| machine | service | processes | RSS, MB | PSS, MB |",
        "|---|---|---:|---:|---:|",
    ]
    for where in ("site", "server"):
        mine = [m for m in memory if m.where == where]
        lines += [f"| {where} | {m.service} | {m.processes} | {m.rss / MB:,.0f} | {m.pss / MB:,.0f} |" for m in mine]  # fmt: skip
        total = (sum(m.processes for m in mine), sum(m.rss for m in mine) / MB, sum(m.pss for m in mine) / MB)  # fmt: skip
        lines.append(f"| **{where}** | **all** | **{total[0]}** | **{total[1]:,.0f}** | **{total[2]:,.0f}** |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Measure installs and idle memory.")
    parser.add_argument("--index", action="append", default=[], metavar="URL")
    indexes = parser.parse_args().index
    with tempfile.TemporaryDirectory(prefix="fedsplit-sizes-") as name:
        root, home = Path(name), Path(name) / "environment"
        wheel = own_wheel(root)
        venv.create(home, with_pip=False)
        sizes, packages, memory = [], [], []
        for extra, what in INSTALLS:
            print(f"installing fedsplit{extra} ...", flush=True)
            install(home / "bin" / "python", wheel, extra, indexes)
            sizes.append((extra, what, bytes_below(home)))
            packages = packages or largest(home)
            if extra == "[server]":
                print("a server and a site that wait ...", flush=True)
                memory = idle(home, root)
        PAGE.write_text(page(sizes, packages, memory), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
