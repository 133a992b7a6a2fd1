"""What a federation folder and a site folder have in common: where it lies, and where its services keep what is theirs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel

from fedsplit.core.config.section import read_by
from fedsplit.core.cut import Cut


def _a_cut_or_nothing(text: str) -> object:
    return Cut.parse(text) if text else None


CutText = Annotated[str, read_by(_a_cut_or_nothing)]
"""A setting "a,b", or empty."""


@dataclass(frozen=True)
class PlantFolder:
    """Paths below a folder. Nothing is read but `settings`, at first use. Raises ConfigError there."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> Self:
        """The folder at `path`, made absolute, with settings that can be read. Raises ConfigError."""
        folder = cls(path.expanduser().resolve())
        _ = folder.settings
        return folder

    @property
    @abstractmethod
    def settings(self) -> BaseModel:
        """What the folder's own file says."""

    @property
    def superexec_secret(self) -> Path:
        return self.path / "secrets" / "superexec.secret"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def present(self) -> Path:
        """What is true while the services run."""
        return self.path / "run"

    @property
    def state(self) -> Path:
        """Which services run, and how."""
        return self.present / "state.json"
