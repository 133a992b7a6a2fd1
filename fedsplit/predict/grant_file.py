"""A grant to predict as a file, where no federation gives one: the operator makes it, the device's person uses it.

`fedsplit encoder grant` writes it, `fedsplit predict --grant FILE` reads it. It holds a token: who has the file may predict
until the grant ends.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsplit.core.encoder import Grant
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import printable, read_json
from fedsplit.core.whole_files import write_whole
from fedsplit.predict.remote import Way
from fedsplit.transport.wiring import ClientTls

_MAX_BYTES = 64 << 10


class GrantFile(BaseModel):
    """What the file says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fedsplit_grant: int = Field(default=1, ge=1, le=1)
    """The format's version."""
    address: str = Field(min_length=3, max_length=300)
    """HOST:PORT of the encoder."""
    token: str = Field(min_length=1, max_length=8192)
    grant: Grant
    ends: float = Field(gt=0)
    """Seconds since the epoch."""
    tls: bool = False
    """Is the encoder dialled with TLS?"""
    ca: str = Field(default="", max_length=32 << 10)
    """The CA that signed the encoder's certificate, PEM; empty: the device's own roots."""

    def write(self, path: Path) -> None:
        """Write it for its owner alone. Raises ConfigError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(
                path, self.model_dump_json(indent=1, exclude_defaults=True) + "\n", mode=0o600
            )
        except OSError as err:
            raise ConfigError(
                f"the grant cannot be written to {path} ({err.strerror or err}); choose another file"
            ) from err

    @classmethod
    def read(cls, path: Path) -> GrantFile:
        """Raises ConfigError for what is no grant, and for one that is over."""
        make = "`fedsplit encoder grant` on the encoder's machine makes one"
        try:
            found = cls.model_validate(read_json(path, limit=_MAX_BYTES))
        except ValidationError as err:
            first = err.errors(include_input=False)[0]
            where = ".".join(printable(part, limit=60) for part in first["loc"]) or "the file"
            raise ConfigError(
                f"{path} is no grant to predict ({where}: {printable(first['msg'], limit=200)}); {make}"
            ) from err
        except (OSError, ValueError) as err:
            why = getattr(err, "strerror", None) or printable(err, limit=200)
            raise ConfigError(f"the grant {path} cannot be read ({why}); {make}") from err
        if found.grant.inference is None:
            raise ConfigError(f"{path} holds a grant of a run, not one to predict; {make}")
        if found.ends <= time.time():
            ago = time.time() - found.ends
            raise ConfigError(
                f"the grant {path} ended {ago / 60:,.0f} minutes ago by this machine's clock; {make}"
            )
        return found

    def way(self, cert: Path | None = None, key: Path | None = None) -> Way:
        """How to dial with it; `cert` and `key` are the device's own, where the encoder wants some."""
        tls = None
        if self.tls or cert is not None:
            ca = self.ca.encode() if self.ca else None
            tls = ClientTls(root_ca=ca, cert=cert, key=key)
        return Way(self.address, self.token, self.grant, self.ends - time.time(), tls)
