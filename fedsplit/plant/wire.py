"""What a site and the control service tell each other, as JSON. Every field is capped: both ends read foreign bytes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedsplit.core.encoder import Grant
from fedsplit.core.foreign import ClassName, Name

MAX_BODY_BYTES = 64 << 10
MAX_COUNTED, MAX_USAGE = 40, 4
"""Classes with a count of their own, and days; so that a report stays below the bytes of a body."""
Pem = Annotated[str, Field(max_length=16 << 10)]
Line = Annotated[str, Field(max_length=500)]
Word = Annotated[str, Field(max_length=64)]
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


class Answered(WireModel):
    """Sums over what a module has answered: no inputs, no single answers."""

    samples: int = Field(default=0, ge=0, le=2**50)
    confidence: float = Field(default=0.0, ge=0, le=2**50, allow_inf_nan=False)
    """Sum of the probabilities of the classes that were answered."""
    classes: Annotated[dict[ClassName, int], Field(max_length=MAX_COUNTED)] = {}
    """Class -> how often it was answered: the most frequent ones. What lacks in `samples` are the others together."""


class DayUsage(WireModel):
    """What a module answered in a day at a site."""

    day: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """UTC."""
    module: Sha256
    answered: Answered


class ModuleState(WireModel):
    """The module that a site uses."""

    digest: Sha256 | Literal[""] = ""
    """Empty: none as yet."""
    expected: Answered | None = None
    """What it answers on the site's own test samples; None: not known as yet, or there are none."""
    fault: Line = ""
    """Why the promoted one is not in use there."""


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
    task: Word = ""
    """The task of the site's data: the promoted module of this task is what it gets."""
    module: ModuleState | None = None
    usage: Annotated[tuple[DayUsage, ...], Field(max_length=MAX_USAGE)] = ()
    """Of the last days."""


class ReportAnswer(WireModel):
    """How the site stands with the federation."""

    standing: Standing
    server_time: float
    message: Line = ""
    modules: Annotated[dict[Word, Sha256], Field(max_length=64)] | None = None
    """Task -> digest of the version in production, of the site's task; None: nobody can say now, nothing changes."""


class ModuleFile(WireModel):
    """A file of a module."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
    bytes: int = Field(ge=0, le=64 * 2**30)
    sha256: Sha256


class ModuleFiles(WireModel):
    """What a version consists of; its digest is made from these names and digests."""

    task: Word
    number: int = Field(ge=1, le=10**9)
    files: Annotated[tuple[ModuleFile, ...], Field(min_length=1, max_length=64)]


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
