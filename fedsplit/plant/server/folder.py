"""A federation folder: where everything of a server lies, and what its federation.toml says.

docs/reference/federation-folder.md describes every file and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedsplit.core.config.section import Section
from fedsplit.plant.folder import CutText, PlantFolder
from fedsplit.plant.settings_file import read_settings

SETTINGS = "federation.toml"
WHAT = "federation folder"


def _settable(settings: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
    from fedsplit.core.config import RunConfig

    if unknown := sorted(settings.keys() - set(RunConfig.keys())):
        raise ValueError(
            f"{unknown[0]!r} is no setting of a run; docs/reference/config.md lists them"
        )
    return settings


class ServerSection(Section):
    """Where sites dial in."""

    host: str = Field(min_length=1, max_length=253)
    """The name or address that sites dial; stands in the server's certificate."""
    port: int = Field(default=8443, ge=1, le=65535)
    """The one public port."""
    bind: str = ""
    """The address that the port is opened on; empty: all of this machine's."""


class BackboneSection(Section):
    """The frozen backbone that the federation's encoder hosts."""

    path: str = "vit-glyphs"
    """A folder in Hugging Face format, or the bundled vit-glyphs."""
    private_blocks: CutText = ""
    """Blocks "a,b" whose weights no site may fetch; empty: none."""


class CertificatesSection(Section):
    """How long things are valid."""

    site_days: int = Field(default=30, ge=1, le=3650)
    """A site's certificate; it renews itself when a third is left."""
    code_hours: float = Field(default=24.0, gt=0, le=24 * 30)
    """A join code."""
    server_days: int = Field(default=397, ge=1, le=3650)
    """The server's own certificate; `server up` renews it."""


class ProxySection(Section):
    """Who ends TLS at the public port."""

    mode: Literal["nginx", "own"] = "nginx"
    """nginx: `server up` runs it. own: you run a proxy; `fedsplit server nginx-conf` shows what it has to do."""
    nginx: str = ""
    """The nginx program; empty: the one on PATH or in /usr/sbin."""


class TlsSection(Section):
    """Certificates of your own PKI for the public port; empty: the federation's."""

    certificate: str = ""
    key: str = ""


class PageSection(Section):
    """The status page."""

    public: bool = False
    """Also at https://HOST:PORT/status/, with a login; else on this machine alone."""


class InferenceSection(Section):
    """What a site may ask of the encoder to predict with."""

    enabled: bool = True
    """May sites predict with the encoder in between at all?"""
    minutes: float = Field(default=60.0, gt=0, le=24 * 60)
    """A grant's life; a site asks for the next one by itself."""
    rows: int = Field(default=100_000, ge=1, le=10**9)
    """Samples of one grant."""
    rows_per_minute: int = Field(default=6_000, ge=1, le=10**6)
    """Samples of a site; who asks faster waits."""
    grants_per_hour: int = Field(default=30, ge=1, le=10_000)
    """Grants of a site. With `rows` it bounds what a site can ask of the encoder in an hour."""


class PromotionSection(Section):
    """What a version of a module has to show before the sites use it."""

    require: bool = True
    """Is it measured on the sites' own test samples before `production` moves?"""
    max_loss_points: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    """Points of accuracy (of numbers: hundredths of R2) that each site may lose against what is in production."""
    min_samples: int = Field(default=5, ge=1)
    """Test samples that each site has to have."""
    when_few: Literal["refuse", "accept"] = "refuse"
    """What becomes of it where a site has fewer."""
    when_away: Literal["refuse", "accept"] = "refuse"
    """What becomes of it where a site with data of the task does not answer."""


class RetentionSection(Section):
    """What is kept, and how much of it."""

    runs: int = Field(default=50, ge=1)
    """Run folders; the oldest go first."""
    log_mb: int = Field(default=20, ge=1, le=10_000)
    """Megabytes of logs of each service."""
    audit_mb: int = Field(default=100, ge=1)
    """Megabytes of the audit log."""


class FederationSettings(Section):
    """federation.toml."""

    server: ServerSection
    backbone: BackboneSection = BackboneSection()
    certificates: CertificatesSection = CertificatesSection()
    proxy: ProxySection = ProxySection()
    tls: TlsSection = TlsSection()
    page: PageSection = PageSection()
    inference: InferenceSection = InferenceSection()
    promotion: PromotionSection = PromotionSection()
    retention: RetentionSection = RetentionSection()
    run: Annotated[dict[str, str | int | float | bool], AfterValidator(_settable)] = Field(
        default_factory=dict
    )
    """Settings of every run here, unless the run is started with others."""


@dataclass(frozen=True)
class FederationFolder(PlantFolder):
    """Where everything lies."""

    @cached_property
    def settings(self) -> FederationSettings:
        """What federation.toml says."""
        return read_settings(self.path / SETTINGS, FederationSettings, what=WHAT)

    @property
    def ca(self) -> Path:
        return self.path / "ca" / "ca.pem"

    @property
    def ca_key(self) -> Path:
        return self.path / "ca" / "ca-key.pem"

    @property
    def certificate(self) -> Path:
        """The public port's: the leaf, then the CA."""
        own = self.settings.tls.certificate
        return self.path / own if own else self.loopback_certificate

    @property
    def certificate_key(self) -> Path:
        own = self.settings.tls.key
        return self.path / own if own else self.loopback_certificate_key

    @property
    def loopback_certificate(self) -> Path:
        """The federation's own: the public host, localhost and 127.0.0.1. The SuperLink shows it."""
        return self.path / "tls" / "server.pem"

    @property
    def loopback_certificate_key(self) -> Path:
        return self.path / "tls" / "server-key.pem"

    @property
    def encoder_secret(self) -> Path:
        """The key that signs sites' tokens."""
        return self.path / "secrets" / "encoder.secret"

    @property
    def proxy_secret(self) -> Path:
        return self.path / "secrets" / "proxy.secret"

    @property
    def page_password(self) -> Path:
        return self.path / "secrets" / "page.password"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of everything that is Flower's here."""
        return self.path / "flower"

    @property
    def superlink_database(self) -> Path:
        return self.flower_home / "superlink.db"

    @property
    def registry(self) -> Path:
        return self.path / "registry.db"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def modules(self) -> Path:
        """The registry of what runs made here."""
        return self.path / "modules"

    @property
    def revoked(self) -> Path:
        return self.present / "revoked.json"

    @property
    def encoder_stats(self) -> Path:
        """What the encoder counts, rewritten every few seconds."""
        return self.present / "encoder.json"

    @property
    def nginx_conf(self) -> Path:
        return self.present / "nginx.conf"
