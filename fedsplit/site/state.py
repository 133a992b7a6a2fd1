"""What a site keeps for itself between the rounds of a run, on its own disk: personal tensors, never sent.

One safetensors file a run and site, written whole. A file that is damaged or of another run counts as none: the
site then starts from what the server sends, as it did in its first round.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedsplit.core.errors import RunDirError

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "~/.fedsplit/sites"


@dataclass(frozen=True)
class Saved:
    """What was kept, and after which round."""

    round: int
    tensors: dict[str, NDArray[np.float32]]

    def under(self, prefix: str) -> dict[str, NDArray[np.float32]]:
        """The tensors whose names start with `prefix/`, without it."""
        start = f"{prefix}/"
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}


class SiteState:
    """The file of one site in one run."""

    def __init__(self, folder: Path, *, run: str, site: str, key: str = "") -> None:
        """`key`: the run's own word, by which another run of the same name is told apart."""
        # Names of sites may hold what file names may not.
        name = hashlib.sha256(f"{run}\n{site}".encode()).hexdigest()[:24]
        self._path = folder.expanduser() / f"{name}.safetensors"
        self._about = {"run": run, "site": site, "key": key}

    def load(self) -> Saved | None:
        """What was kept, or None."""
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="numpy") as file:
                about = file.metadata() or {}
                if {k: about.get(k, "") for k in self._about} != self._about:
                    raise ValueError("it belongs to another run or site")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if odd := [
                    n
                    for n, t in tensors.items()
                    if t.dtype != np.float32 or not np.isfinite(t).all()
                ]:
                    raise ValueError(f"{odd[0]!r} is not finite float32")
                return Saved(int(about["round"]), tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as err:
            log.warning("%s cannot be used and is left aside: %s", self._path, err)
            return None

    def save(self, round_: int, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep `tensors` in place of what was kept. Raises RunDirError where the disk does not take them."""
        part = self._path.with_suffix(".part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
            save_file(whole, part, metadata=self._about | {"round": str(round_)})
            # Learnt of the site's data, and the folder may be one that others read.
            part.chmod(0o600)
            part.replace(self._path)
        except (OSError, SafetensorError) as err:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise RunDirError(
                f"this site cannot keep its own tensors in {self._path.parent}: {err}; free some space, or set "
                f"state-dir in its node config to another folder"
            ) from err
