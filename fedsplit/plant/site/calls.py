"""A site's calls to the control service: over the public port, believing one CA alone, answers read strictly.

`look` asks who is there before anything is believed: it sends nothing that is secret, and gets the certificates that the
server shows. `ControlCalls` are the calls proper. Proxy variables hold, but for loopback. No torch, no flwr.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography import x509
from pydantic import BaseModel, ValidationError

from fedsplit.core.address import is_loopback
from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, ServerAwayError
from fedsplit.core.foreign import parse_json, printable
from fedsplit.plant import paths
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.line_faults import refuse, translated
from fedsplit.plant.wire import (
    MAX_BODY_BYTES,
    GrantAnswer,
    GrantRequest,
    Hello,
    JoinAnswer,
    JoinRequest,
    RenewAnswer,
    RenewRequest,
    Report,
    ReportAnswer,
)

TIMEOUT_S = 20.0
_Answer = TypeVar("_Answer", bound=BaseModel)
_MAX_CERTIFICATES = 10
_MAX_CERTIFICATE_BYTES = 16 << 10


@dataclass(frozen=True)
class Look:
    """What stands at an address, before it is believed."""

    hello: Hello
    certificates: tuple[x509.Certificate, ...]
    """The server's own first, then those that it sends along."""


def look(address: str, *, timeout_s: float = TIMEOUT_S) -> Look:
    """Ask who is there. Raises ServerAwayError where nobody answers, or not as fedsplit does."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname = False
    anybody.verify_mode = ssl.CERT_NONE
    with _client(address, anybody, timeout_s) as client:
        body, stream = _sent(client, address, "GET", paths.HELLO, None)
        hello = _read(body, Hello, address)
    return Look(hello, stream)


class ControlCalls(Closing):
    """Calls to the control service of one server, as anybody or with a site's certificate."""

    def __init__(
        self,
        address: str,
        ca: Path | str,
        pair: tuple[Path, Path] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`ca`: a file, or PEM text. `pair`: certificate and key. Raises PlantError for files that cannot be used."""
        self._address = address
        self._client = _client(address, trusting(ca, pair), timeout_s)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def hello(self) -> Hello:
        """Who is there. Raises ServerAwayError."""
        return self._get(paths.HELLO, Hello)

    def join(self, request: JoinRequest) -> JoinAnswer:
        """Redeem a code; the same request may be sent again. Raises ServerAwayError, ServerRefusalError."""
        return self._post(paths.JOIN, request, JoinAnswer)

    def renew(self, request: RenewRequest) -> RenewAnswer:
        """Get the next certificate. Raises PlantError."""
        return self._post(paths.RENEW, request, RenewAnswer)

    def report(self, report: Report) -> ReportAnswer:
        """Say how the site is, and hear how it stands. Raises PlantError."""
        return self._post(paths.REPORT, report, ReportAnswer)

    def grant(self, request: GrantRequest) -> GrantAnswer:
        """Get a token to predict with. Raises PlantError."""
        return self._post(paths.GRANT, request, GrantAnswer)

    def _get(self, path: str, model: type[_Answer]) -> _Answer:
        return _read(_sent(self._client, self._address, "GET", path, None)[0], model, self._address)

    def _post(self, path: str, request: BaseModel, model: type[_Answer]) -> _Answer:
        # A server of before takes no field that it does not know.
        body = request.model_dump_json(exclude_defaults=True).encode()
        return _read(
            _sent(self._client, self._address, "POST", path, body)[0], model, self._address
        )


def open_client(folder: SiteFolder, *, timeout_s: float = TIMEOUT_S) -> httpx.Client:
    """A client of the public port, with the site's certificate as it is now. Raises ConfigError for files that cannot be used."""
    pair = (folder.certificate, folder.certificate_key)
    return _client(folder.settings.site.address, trusting(folder.ca, pair), timeout_s)


def trusting(ca: Path | str, pair: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """TLS that believes one CA alone, and shows a certificate where there is one. Raises ConfigError for the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        text = ca if isinstance(ca, str) else ca.read_text(encoding="ascii")
        context.load_verify_locations(cadata=text)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"the CA's certificate {'' if isinstance(ca, str) else printable(ca)} cannot be used ({printable(err)}); "
            f"copy it from the server again, or join again with a new code"
        ) from err
    if pair is not None:
        try:
            context.load_cert_chain(*pair)
        except (OSError, ValueError) as err:
            raise ConfigError(
                f"the site's certificate {printable(pair[0])} and key {printable(pair[1])} cannot be used together "
                f"({printable(getattr(err, 'reason', None) or err)}); join again with a new code"
            ) from err
    return context


def _client(address: str, tls: ssl.SSLContext, timeout_s: float) -> httpx.Client:
    try:
        url = httpx.URL(f"https://{address}")
    except (httpx.InvalidURL, UnicodeError) as err:
        raise ConfigError(
            f"{printable(address)} is no address: HOST:PORT is wanted, e.g. fedsplit.example:8443"
        ) from err
    # A proxy of an office knows nothing of this machine's own ports.
    proxied = not is_loopback(address)
    return httpx.Client(
        base_url=url,
        verify=tls,
        timeout=timeout_s,
        trust_env=proxied,
        # Nothing that unpacks to more than it is.
        headers={"accept-encoding": "identity"},
    )


def _sent(
    client: httpx.Client, address: str, method: str, path: str, body: bytes | None
) -> tuple[bytes, tuple[x509.Certificate, ...]]:
    """The answer's body, and the certificates that came with it. Raises PlantError."""
    headers = {"content-type": "application/json"} if body is not None else {}
    with translated(address), client.stream(method, path, content=body, headers=headers) as answer:
        found = bytearray()
        for piece in answer.iter_raw():
            found += piece
            if len(found) > MAX_BODY_BYTES:
                raise ServerAwayError(
                    f"the server at {address} answers with more than {MAX_BODY_BYTES} bytes; is it a fedsplit server?"
                )
        refuse(answer.status_code, bytes(found), address)
        return bytes(found), _shown(answer)


def _read(body: bytes, model: type[_Answer], address: str) -> _Answer:
    try:
        return model.model_validate(parse_json(body, limit=MAX_BODY_BYTES))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(printable(part, limit=60) for part in first["loc"])
        why = f"{where}: {printable(first['msg'])}"
    except ValueError as err:
        why = printable(err)
    raise ServerAwayError(
        f"the server at {address} answers what this fedsplit cannot read ({why}); is it a fedsplit server of the same "
        f"version?"
    )


def _shown(answer: httpx.Response) -> tuple[x509.Certificate, ...]:
    """The certificates that the server sent, unverified."""
    stream = answer.extensions.get("network_stream")
    tls: Any = stream.get_extra_info("ssl_object") if stream is not None else None
    if tls is None:
        return ()
    # Python gives the chain by this name from 3.13 on; before, its own object does.
    chain = (tls if hasattr(tls, "get_unverified_chain") else tls._sslobj).get_unverified_chain()
    found = []
    for one in list(chain or ())[:_MAX_CERTIFICATES]:
        der = one if isinstance(one, bytes) else ssl.PEM_cert_to_DER_cert(one.public_bytes())
        if len(der) <= _MAX_CERTIFICATE_BYTES:
            try:
                found.append(x509.load_der_x509_certificate(der))
            except ValueError:
                continue
    return tuple(found)
