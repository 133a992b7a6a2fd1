"""A site folder: where everything of a site's machine lies, and what its site.toml says.

docs/reference/site-folder.md describes every file and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field

from fedsplit.core.config.section import Section
from fedsplit.core.foreign import Name
from fedsplit.plant.folder import CutText, PlantFolder
from fedsplit.plant.settings_file import read_settings

SETTINGS = "site.toml"
WHAT = "site folder"


class SiteSection(Section):
    """Who the site is, and what it trains on."""

    name: Name
    address: str = Field(min_length=3, max_length=300)
    """HOST:PORT of the server's one public port."""
    task: str = Field(min_length=1, max_length=64)
    """The task that the data is for."""
    data: str = Field(min_length=1, max_length=4096)
    """The source, e.g. folder:/data/line-a."""
    cut: CutText = ""
    """The site's own cut "a,b"; empty: the run's."""
    backbone_sha256: str = ""
    """The backbone that was fetched when the site joined."""


class ReadingSection(Section):
    """How the source is read. docs/reference/node-config.md has the words."""

    text_column: str = ""
    label_column: str = ""
    classes: str = ""
    pixel_max: float = Field(default=0.0, ge=0)


class MachineSection(Section):
    """What of the machine the site may use."""

    threads: int = Field(default=0, ge=0)
    """Threads for computing; 0: all."""
    memory_mb: int = Field(default=0, ge=0)
    """Megabytes that may be kept between rounds; 0: by what is free at the start."""


class RetentionSection(Section):
    """What is kept, and how much of it."""

    runs: int = Field(default=50, ge=1)
    """Runs whose records and state are kept; the oldest go first."""
    log_mb: int = Field(default=20, ge=1, le=10_000)
    """Megabytes of logs of each process."""
    modules: int = Field(default=3, ge=1, le=1000)
    """Versions of the module, the one in use among them: a rollback to one of them needs no line."""


class ServeSection(Section):
    """Whether the runtime answers predictions beside its training, and where (docs/how-to/serve.md)."""

    port: int = Field(default=0, ge=0, le=65535)
    """Where to listen; 0: nothing is served."""
    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    """Beyond loopback a certificate and a token are wanted."""
    tls_cert: str = ""
    """A PEM file; this path and the next two may start at the site folder."""
    tls_key: str = ""
    token_file: str = ""


class SiteFile(Section):
    """site.toml."""

    site: SiteSection
    reading: ReadingSection = ReadingSection()
    machine: MachineSection = MachineSection()
    retention: RetentionSection = RetentionSection()
    serve: ServeSection = ServeSection()


@dataclass(frozen=True)
class SiteFolder(PlantFolder):
    """Where everything lies."""

    @cached_property
    def settings(self) -> SiteFile:
        """What site.toml says."""
        return read_settings(self.path / SETTINGS, SiteFile, what=WHAT)

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    @property
    def certificate(self) -> Path:
        return self.path / "site.pem"

    @property
    def certificate_key(self) -> Path:
        return self.path / "site-key.pem"

    @property
    def node_key(self) -> Path:
        """The SuperNode's private key (OpenSSH); its public half ends in .pub."""
        return self.path / "node-key"

    @property
    def backbones(self) -> Path:
        """The store of backbone parts."""
        return self.path / "backbones"

    @property
    def modules(self) -> Path:
        """The versions of the module that came from the server."""
        return self.path / "modules"

    @property
    def current_modules(self) -> Path:
        """{task: digest} of what is in use."""
        return self.modules / "current.json"

    @property
    def kept(self) -> Path:
        """The site's own state between rounds: node config `state-dir`."""
        return self.path / "state"

    @property
    def doing(self) -> Path:
        """What the resident runtime does now."""
        return self.present / "runtime.json"
