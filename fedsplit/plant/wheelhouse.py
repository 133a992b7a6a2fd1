"""Everything that a machine without a network needs to install fedsplit: wheels, their hashes, and one command.

uv resolves for the other platform, as pip cannot: it reads the markers of the platform that it runs on. pip fetches, by
uv's hashes. Versions are those that are installed here, so that a site runs what its server runs.
"""

from __future__ import annotations

import ast
import email
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uv
from packaging.requirements import Requirement

from fedsplit.core.errors import ConfigError, WheelhouseError
from fedsplit.core.extras import Extra
from fedsplit.core.foreign import printable
from fedsplit.plant.own_wheel import own_wheel

REQUIREMENTS, COMMAND, WHEELS = "requirements.txt", "install.txt", "wheels"
_GLIBC = 28
"""The oldest glibc, 2.28 of 2018, that torch's wheels want, too."""
_TIMEOUT_S = 3600.0
_LINES = 20
_OPTIONS = ("index-url", "extra-index-url", "find-links", "no-index", "cert")


def _linux(machine: str) -> tuple[str, ...]:
    return (*(f"manylinux_2_{n}_{machine}" for n in range(_GLIBC, 16, -1)), f"manylinux2014_{machine}")  # fmt: skip


PLATFORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "linux-x86_64": ("x86_64-manylinux_2_28", (*_linux("x86_64"), "manylinux2010_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64")),
    "linux-aarch64": ("aarch64-manylinux_2_28", _linux("aarch64")),
    "windows-amd64": ("x86_64-pc-windows-msvc", ("win_amd64",)),
    "macos-arm64": ("aarch64-apple-darwin", tuple(f"macosx_{n}_0_{kind}" for n in range(13, 10, -1) for kind in ("arm64", "universal2"))),
}  # fmt: skip
"""Name -> uv's name, and the tags of wheels that pip may take, beside pure Python's."""


@dataclass(frozen=True, kw_only=True)
class Wheelhouse:
    """What was gathered."""

    folder: Path
    wheels: dict[str, int]
    """File name -> bytes."""
    command: str
    notes: list[str] = field(default_factory=list)


def gather(
    folder: Path,
    *,
    platform: str,
    python: str,
    extras: Sequence[Extra] = (),
    indexes: Sequence[str] = (),
) -> Wheelhouse:
    """Fill `folder`, new or of an earlier time. `indexes` are looked in beside those that pip is set to.

    Raises ConfigError for what cannot be meant, WheelhouseError for what cannot be had.
    """
    if platform not in PLATFORMS:
        raise ConfigError(f"--platform {printable(platform, limit=60)!r} is not known; use one of {', '.join(PLATFORMS)}")  # fmt: skip
    if not re.fullmatch(r"3\.\d{1,2}", python):
        raise ConfigError(f"--python {printable(python, limit=20)!r} is no version; write e.g. 3.11")  # fmt: skip
    if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):  # fmt: skip
        raise ConfigError(f"{folder} is there and is no wheelhouse; give a folder that is new or empty")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="fedsplit-wheelhouse-") as name:
        made = Path(name)
        own = own_wheel(made)
        hashed = _resolved(made, needed(own, extras), platform, python, indexes)
        wheels = folder / WHEELS
        wheels.mkdir(parents=True, exist_ok=True)
        # Until the end nobody takes half a wheelhouse for a whole one.
        for half in (REQUIREMENTS, COMMAND):
            (folder / half).unlink(missing_ok=True)
        _fetched(hashed, wheels, platform, python, indexes)
        shutil.copy(own, wheels)
        return _written(folder, own.name, hashed, extras, python)


def needed(wheel: Path, extras: Sequence[Extra] = ()) -> list[str]:
    """The requirements that fedsplit's wheel names, with those extras."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(files.read(name))
    found = []
    for line in told.get_all("Requires-Dist", []):
        need = Requirement(line)
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
            need.marker = None
            found.append(str(need))
    return found


def pip_indexes() -> dict[str, list[str]]:
    """Where pip looks on this machine, by option: uv does not read pip's settings."""
    found: dict[str, list[str]] = {}
    for line in _called([*_pip(), "config", "list"], "pip's settings cannot be read").splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        # The environment's come first, and win.
        if option in _OPTIONS and option not in found:
            found[option] = str(ast.literal_eval(value)).split()
    return found


def _is_ours(folder: Path) -> bool:
    return (folder / WHEELS).is_dir() and {p.name for p in folder.iterdir()} <= {WHEELS, REQUIREMENTS, COMMAND}  # fmt: skip


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise WheelhouseError(f"there is no pip in {sys.prefix}, which fetches the wheels; install it there: {sys.executable} -m ensurepip")  # fmt: skip
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _resolved(
    made: Path, needs: Sequence[str], platform: str, python: str, indexes: Sequence[str]
) -> Path:
    """A requirements file with hashes of all that `needs` needs on the platform."""
    asked, pinned, hashed = made / "asked.txt", made / "pinned.txt", made / "hashed.txt"
    asked.write_text("\n".join(needs) + "\n", encoding="utf-8")
    pinned.write_text("\n".join(_installed()) + "\n", encoding="utf-8")
    found = pip_indexes()
    command = [
        uv.find_uv_bin(), "pip", "compile", str(asked), "--constraint", str(pinned), "--output-file", str(hashed),
        "--python-platform", PLATFORMS[platform][0], "--python-version", python, "--only-binary", ":all:",
        "--generate-hashes", "--no-header", "--no-annotate", "--quiet", "--no-config",
        "--index-strategy", "unsafe-best-match",
    ]  # fmt: skip
    if found.get("no-index") == ["true"] or found.get("no-index") == ["1"]:
        command += ["--no-index"]
    for url in found.get("index-url", []):
        command += ["--default-index", url]
    for url in (*indexes, *found.get("extra-index-url", [])):
        command += ["--index", url]
    for url in found.get("find-links", []):
        command += ["--find-links", url]
    env = {"SSL_CERT_FILE": found["cert"][0]} if "cert" in found else {}
    _called(command, f"the wheels for {platform}, Python {python}, cannot be found", env=env)
    return hashed


def _installed() -> list[str]:
    """The versions of this machine, without the local part: it names a build for this platform."""
    found = {
        f"{dist.metadata['Name']}=={dist.version.partition('+')[0]}"
        for dist in importlib.metadata.distributions()
        if dist.metadata["Name"] not in {"fedsplit", "pip", "setuptools", "wheel"}
    }
    return sorted(found)


def _fetched(
    hashed: Path, wheels: Path, platform: str, python: str, indexes: Sequence[str]
) -> None:
    command = [
        *_pip(), "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(wheels),
        "--requirement", str(hashed), "--python-version", python, "--implementation", "cp",
    ]  # fmt: skip
    for tag in PLATFORMS[platform][1]:
        command += ["--platform", tag]
    for url in indexes:
        command += ["--extra-index-url", url]
    _called(command, f"the wheels for {platform} cannot be fetched")


def _written(
    folder: Path, own: str, hashed: Path, extras: Sequence[Extra], python: str
) -> Wheelhouse:
    """Keep the wheels that are wanted, write their hashes and the command."""
    wanted = re.findall(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", hashed.read_text("utf-8"), re.MULTILINE)
    names = {_stem(name, version): f"{name}=={version}" for name, version in wanted}
    extra = f"[{','.join(sorted(extras))}]" if extras else ""
    version = importlib.metadata.version("fedsplit")
    lines, sizes = [], {}
    for wheel in sorted((folder / WHEELS).iterdir()):
        stem = "-".join(wheel.name.split("-")[:2]).lower()
        need = f"fedsplit{extra}=={version}" if wheel.name == own else names.get(stem)
        if need is None:
            wheel.unlink()  # of an earlier time
            continue
        lines.append(f"{need} --hash=sha256:{_digest(wheel)}")
        sizes[wheel.name] = wheel.stat().st_size
    (folder / REQUIREMENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = f"pip install --no-index --find-links {WHEELS} --require-hashes -r {REQUIREMENTS}"
    (folder / COMMAND).write_text(
        f"On the machine, in this folder, with Python {python}:\n\n    python3 -m venv ~/fedsplit\n"
        f"    ~/fedsplit/bin/{command}\n\nThen the command is ~/fedsplit/bin/fedsplit.\n",
        encoding="utf-8",
    )
    return Wheelhouse(folder=folder, wheels=sizes, command=command, notes=_cuda(sizes))


def _stem(name: str, version: str) -> str:
    return f"{re.sub(r'[-_.]+', '_', name)}-{version}".lower()


def _cuda(sizes: dict[str, int]) -> list[str]:
    """fedsplit computes without a GPU, and torch's usual wheels bring gigabytes for one."""
    cuda = [n for name, n in sizes.items() if name.startswith(("nvidia_", "cuda_", "triton-"))]
    if not cuda:
        return []
    return [
        f"{len(cuda)} wheels, {sum(cuda) / 1e9:.1f} GB, are CUDA libraries, which fedsplit does not use; to leave them "
        "out give the address of PyTorch's index of CPU builds with --index"
    ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _called(command: Sequence[str], fault: str, *, env: dict[str, str] | None = None) -> str:
    """What a program printed. Raises WheelhouseError with its words."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise WheelhouseError(f"{fault}: {Path(command[0]).name} {printable(err)}") from err
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        words = "\n".join(f"  {printable(line)}" for line in said.splitlines()[:_LINES])
        raise WheelhouseError(f"{fault}: {_advice(said)}\n{words}")
    return done.stdout


def _advice(said: str) -> str:
    if re.search(r"error sending request|Failed to fetch|NewConnectionError|Name or service", said):
        return "the package index was not reached: see to the network, the proxy variables and pip's index-url"
    if (
        "no usable wheels" in said
        or "no wheels with a matching" in said
        or "Wheels are required" in said
    ):
        return "a dependency has no wheel for it: install another version of that one here, or build its wheel there"
    if "No space left" in said:
        return "the disk is full: free some space, or give a folder on another disk"
    return "see what follows"
