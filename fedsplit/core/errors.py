"""The one exception tree of fedsplit. Foreign errors are translated into it once, at the edge, and chained.

    FedsplitError
    ├── ConfigError         a setting is unknown, malformed or contradicts another one
    ├── BackboneError       a model directory cannot be used: family, missing weights, wrong digest
    ├── DataError           a site's data cannot be used; names the site and the file
    ├── UpdateError         a site's module update fails its checks and does not count
    ├── EncoderError        something between a site and the encoder
    │   ├── RefusedError        the encoder says no: token, backbone, version, cut, limits
    │   ├── ProtocolError       a frame is malformed, out of order or of the wrong shape
    │   ├── OverloadedError     the encoder, or a service that predicts, is full; carries `retry_after_s`
    │   └── UnreachableError    nobody answers at the address, the peer died or a deadline passed
    ├── FederationError     the run cannot go on: too few sites, no useful update
    │   ├── RoundLostError      a round came to nothing for reasons that may pass; it is done once more
    │   ├── DivergedError       a site's loss stopped being finite
    │   └── SuperNodeError      the SuperNode beside a site's executor does not answer, or wants an order no more
    ├── ServiceError        a service of a server or a site does not start, or its folder is in use already
    ├── EnrolmentError      the federation does not let a site in, or no more; carries `kind`
    ├── FolderError         a federation folder or a site folder cannot be read or written: disk full, rights
    ├── PlantError          something between a site and its server's control service
    │   ├── ServerAwayError     nobody answers there as yet; trying again makes sense
    │   ├── ServerRefusalError  the server says no, in its own words: a code, a request
    │   └── NotMemberError      the site is no member any more: revoked, rotated, its certificate over
    ├── WheelhouseError     what another machine needs for an install cannot be had: no index, no wheel, no room
    ├── ExportError         an exported module does not answer as the module itself does
    ├── RegistryError       a registry of modules cannot be read or written, or an alias has moved meanwhile
    ├── PromotionError      a version may not go into production: the sites measured a loss, or could not measure
    └── RunDirError         a run directory cannot be written or read: disk full, damaged checkpoint

Every message says what it got, what it wanted and what to do.
"""

from __future__ import annotations


class FedsplitError(Exception):
    """Base of all errors that fedsplit raises on purpose."""


class ConfigError(FedsplitError):
    """A setting is unknown, malformed or contradicts another one."""


class BackboneError(FedsplitError):
    """A model directory cannot be used as a backbone."""


class DataError(FedsplitError):
    """A site's data cannot be used; the message names the site and the file."""


class UpdateError(FedsplitError):
    """A site's module update fails its checks and does not count."""


class EncoderError(FedsplitError):
    """Something went wrong between a site and the encoder."""


class RefusedError(EncoderError):
    """The encoder refuses a session or a step: token, backbone, version, cut or limits."""


class ProtocolError(EncoderError):
    """A frame is malformed, oversized, truncated, out of order or of the wrong shape."""


class OverloadedError(EncoderError):
    """The encoder, or a service that predicts, is full; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnreachableError(EncoderError):
    """Nobody answers at the encoder's address, the peer died or a deadline passed."""


class FederationError(FedsplitError):
    """The run cannot go on: too few sites or no useful update."""


class RoundLostError(FederationError):
    """A round came to nothing for reasons that may pass; `why` says which. It is done once more."""

    def __init__(self, message: str, *, why: str = "") -> None:
        super().__init__(message)
        self.why = why


class DivergedError(FederationError):
    """A site's training loss stopped being finite."""


class ServiceError(FedsplitError):
    """A service of a server or a site does not start, or the folder's services run already."""


class EnrolmentError(FedsplitError):
    """The federation does not let a site in, or no more; `kind` is one word of why, for programs."""

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class FolderError(FedsplitError):
    """A federation folder or a site folder cannot be read or written."""


class SuperNodeError(FederationError):
    """The SuperNode on this machine does not answer; `lost`: it counts on the order no more."""

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class PlantError(FedsplitError):
    """Something went wrong between a site and its server's control service."""


class ServerAwayError(PlantError):
    """Nobody answers at the server's public port as it should: not there, no way, other TLS. It may pass."""


class ServerRefusalError(PlantError):
    """The server refuses a request, in its own words."""


class NotMemberError(PlantError):
    """The site is no member of the federation any more: revoked, rotated, or its certificate is over."""


class RunDirError(FedsplitError):
    """A run directory cannot be written or read."""


class RegistryError(FedsplitError):
    """A registry of modules cannot be read or written, or was changed by somebody else meanwhile."""


class PromotionError(FedsplitError):
    """A version of a module may not go into production: the sites measured a loss, or could not measure."""


class ExportError(FedsplitError):
    """An exported module does not answer as the module itself does."""


class WheelhouseError(FedsplitError):
    """What another machine needs to install fedsplit cannot be gathered here."""
