"""What a site and the control service tell each other, as JSON. Every field is capped: both ends read foreign bytes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedsplit.core.encoder import Grant
from fedsplit.core.foreign import Name

MAX_BODY_BYTES = 64 << 10
Pem = Annotated[str, Field(max_length=16 << 10)]
Line = Annotated[str, Field(max_length=500)]
Serial = Annotated[str, Field(pattern=r"^[0-9A-F]{1,40}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

SiteState = Literal["starting", "idle", "working", "stopping", "failing"]
Standing = Literal["member", "revoked", "rotated"]


class WireModel(BaseModel):
    """Read strictly: an unknown field is another version's."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Hello(WireModel):
    """Who answers at the public port, and what time it is there."""

    fedsplit_version: Line
    server_time: float
    """Seconds since the epoch."""


class JoinRequest(WireModel):
    """A join code's id and secret, and the public halves of the keys that the site has made."""

    code_id: Annotated[str, Field(max_length=64)]
    secret: Annotated[str, Field(max_length=128)]
    csr: Pem
    """A certificate signing request; its subject is not looked at."""
    node_key: Annotated[str, Field(max_length=1000)]
    """The SuperNode's public key, one line of OpenSSH."""
    fedsplit_version: Line


class JoinAnswer(WireModel):
    """What a site needs to be a member."""

    site: Name
    certificate: Pem
    ca: Pem
    backbone: Line
    backbone_sha256: Sha256
    cut: Annotated[str, Field(max_length=20)]
    """"a,b" that the federation's runs have unless they say otherwise; a site may choose its own."""


class RenewRequest(WireModel):
    """A new signing request, over the connection that the present certificate opens."""

    csr: Pem


class RenewAnswer(WireModel):
    """The new certificate."""

    certificate: Pem


class Report(WireModel):
    """How a site is, every few seconds."""

    state: SiteState
    detail: Line = ""
    """What it works on, or why it fails."""
    fedsplit_version: Line = ""
    versions: Annotated[dict[Line, Line], Field(max_length=16)] = {}
    backbone_loads: int = Field(default=0, ge=0)
    rss_bytes: int = Field(default=0, ge=0)
    disk_free_bytes: int = Field(default=0, ge=0)
    certificate_ends: float = 0.0
    """Seconds since the epoch."""


class ReportAnswer(WireModel):
    """How the site stands with the federation."""

    standing: Standing
    server_time: float
    message: Line = ""


class GrantRequest(WireModel):
    """What a site wants to predict with."""

    version: Sha256
    """The module's digest."""
    backbone_sha256: Sha256
    cut: Annotated[str, Field(max_length=20)]
    """"a,b": the blocks that the encoder runs."""
    fedsplit_version: Line


class GrantAnswer(WireModel):
    """A token for the encoder, and what it says."""

    token: Annotated[str, Field(max_length=8192)]
    grant: Grant
    seconds: Annotated[float, Field(gt=0, le=24 * 3600)]
    """How long it is good for, from now on."""


class Refusal(WireModel):
    """What an answer other than 2xx holds under "error"."""

    kind: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=2000)]
