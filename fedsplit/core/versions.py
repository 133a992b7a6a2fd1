"""What is installed on this machine, so that both ends of a federation can compare it.

A site with another fedsplit is left out, for the two may not mean the same by one setting; other
versions of the libraries that compute are told.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedsplit

COMPARED = ("torch", "transformers", "peft")
"""Libraries whose version can change what a site computes."""
CODE = "fedsplit-code"
_NONE = "none"


@functools.cache
def installed() -> dict[str, str]:
    """Package -> version of what decides a site's numbers, and the first characters of a digest of fedsplit's code."""
    return {"fedsplit": fedsplit.__version__, CODE: _code_digest()} | {
        name: _version(name) for name in COMPARED
    }


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What differs, a phrase each: "torch 2.9.0 here, 2.13.0 at the server". `ours` is the server's."""
    return [
        f"{_word(name)} {theirs.get(name, _NONE)} here, {ours[name]} at the server"
        for name in ours
        if theirs.get(name, _NONE) != ours[name]
    ]


def _word(name: str) -> str:
    return "fedsplit's code" if name == CODE else name


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return _NONE


def _code_digest() -> str:
    """Of every Python file of the installed package: two checkouts of one version may differ."""
    top = Path(fedsplit.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(top.rglob("*.py"), key=lambda p: p.relative_to(top).as_posix()):
        digest.update(path.relative_to(top).as_posix().encode() + b"\0")
        # As git hands it out on any system.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12]
