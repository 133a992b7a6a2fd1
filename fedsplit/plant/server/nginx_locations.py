"""The locations of nginx.conf: each public path, where it goes, and what is answered where something is wrong.

Used by nginx_conf.py, which says what holds for all of them. A block is a list of lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.proxied import PROXY_HEADER, REASON_HEADER, SERIAL_HEADER, SITE_HEADER
from fedsplit.plant import paths
from fedsplit.plant.server.folder import FederationFolder

_KINDS = {
    403: ("$fedsplit_kind", "$fedsplit_refusal"),
    404: ("not-found", "nothing answers at this path"),
    405: ("bad-request", "the method is not allowed at this path"),
    413: ("bad-request", "the body is larger than this path allows"),
    500: ("unavailable", "the server cannot answer now; try again"),
    502: ("unavailable", "a service of the server does not answer; try again"),
    503: ("too-many", "too many requests from this address; try again"),
    504: ("unavailable", "a service of the server did not answer in time; try again"),
}
_SUPERLINK = "fedsplit_superlink"
_PAGE = {"": "/", "events": "/events", "status.json": "/status.json"}
_ASK = "/fedsplit-authorise"
_ASKED = (
    f"auth_request {_ASK};",
    f"auth_request_set $fedsplit_reason $upstream_http_{REASON_HEADER.replace('-', '_')};",
)
# gRPC's own numbers for the same.
_GRPC = {403: 7, 404: 12, 405: 12, 413: 3, 500: 14, 502: 14, 503: 8, 504: 14}


@dataclass(frozen=True)
class Ports:
    """The loopback ports that nginx forwards to."""

    superlink: int
    encoder: int
    control: int


def fleet(folder: FederationFolder, port: int) -> list[str]:
    """Flower's Fleet API. SuperNodes have no client certificates; the SuperLink checks their keys."""
    lines = []
    for call in paths.FLEET_CALLS:
        # Flower cuts arrays into objects of 5 MiB.
        most = "16m" if call == "push-object" else "4m"
        lines += block(
            f"location = {paths.FLEET}/{call}",
            [
                *_only("POST"),
                f"client_max_body_size {most};",
                "limit_req zone=fedsplit_sites burst=400 nodelay;",
                *told("proxy", None),
                # Else nginx closes the connection behind each request, and the SuperLink shakes hands for each object.
                'proxy_set_header connection "";',
                f'proxy_set_header host "127.0.0.1:{port}";',
                "proxy_ssl_verify on;",
                f"proxy_ssl_trusted_certificate {quoted(folder.ca)};",
                "proxy_ssl_name localhost;",
                "proxy_ssl_server_name on;",
                f"proxy_pass https://{_SUPERLINK}{paths.FLEET}/{call};",
            ],
        )
    return lines


def superlink(port: int) -> list[str]:
    """The SuperLink, with connections that stay: a message is a dozen requests, each with a handshake otherwise."""
    return block(
        f"upstream {_SUPERLINK}",
        # The SuperLink's server closes one that is idle for 5 s, and nginx has to be first.
        [f"server 127.0.0.1:{port};", "keepalive 32;", "keepalive_timeout 3s;"],
    )


def encoder(port: int, secret: str) -> list[str]:
    """Our gRPC calls. A stream lives for a round and carries as much as it likes; the encoder bounds it."""
    lines = []
    for call in paths.ENCODER_CALLS:
        lines += block(
            f"location = {call}",
            [
                *errors("grpc"),
                *_only("POST"),
                "if ($fedsplit_nameless) { return 403; }",
                *_ASKED,
                "client_max_body_size 0;",
                "client_body_buffer_size 1m;",
                "client_body_timeout 3600s;",
                "send_timeout 300s;",
                "grpc_connect_timeout 5s;",
                "grpc_read_timeout 3600s;",
                "grpc_send_timeout 3600s;",
                "grpc_buffer_size 256k;",
                *told("grpc", secret),
                f"grpc_pass grpc://127.0.0.1:{port};",
            ],
        )
    return lines


def control(port: int, proxied: list[str]) -> list[str]:
    """The control service's paths. It knows who is a member, and says itself why somebody is not."""
    to = f"proxy_pass http://127.0.0.1:{port}"
    often = [*proxied, "limit_req zone=fedsplit_sites burst=400 nodelay;"]
    seldom = [*proxied, "limit_req zone=fedsplit_join burst=20 nodelay;"]
    certified = [
        *often,
        "if ($fedsplit_nameless) { return 403; }",
    ]
    file = "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
    ask = [
        "internal;",
        *proxied,
        "proxy_pass_request_body off;",
        'proxy_set_header Content-Length "";',
        f"{to}{paths.AUTHORISE};",
    ]
    return [
        *block(f"location = {paths.HELLO}", [*_only("GET"), *often, f"{to}{paths.HELLO};"]),
        *block(f"location = {paths.JOIN}", [*_only("POST"), *seldom, f"{to}{paths.JOIN};"]),
        *block(f"location = {paths.RENEW}", [*_only("POST"), *certified, f"{to}{paths.RENEW};"]),
        *block(f"location = {paths.REPORT}", [*_only("POST"), *certified, f"{to}{paths.REPORT};"]),
        *block(f"location = {paths.GRANT}", [*_only("POST"), *certified, f"{to}{paths.GRANT};"]),
        *block(
            f"location = {paths.MANIFEST}", [*_only("GET"), *certified, f"{to}{paths.MANIFEST};"]
        ),
        *block(f'location ~ "^{paths.FILES}/{file}$"', [*_only("GET"), *certified, f"{to};"]),
        *block(
            f'location ~ "^{paths.TENSORS}/[0-9a-f]{{64}}$"', [*_only("GET"), *certified, f"{to};"]
        ),
        *block(
            f'location ~ "^{paths.MODULES}/[0-9a-f]{{64}}(?:/files/{file})?$"',
            [*_only("GET"), *certified, f"{to};"],
        ),
        *block(f"location = {_ASK}", ask),
    ]


def page(folder: FederationFolder, port: int, proxied: list[str]) -> list[str]:
    """The status page, with a login. Its events go on for as long as somebody looks."""
    lines = []
    for shown, path in _PAGE.items():
        lines += block(
            f"location = /status/{shown}",
            [
                *_only("GET"),
                "limit_req zone=fedsplit_page burst=40 nodelay;",
                'auth_basic "fedsplit";',
                f"auth_basic_user_file {quoted(folder.nginx_conf.parent / 'nginx' / 'page.login')};",
                *proxied,
                "proxy_buffering off;",
                "proxy_read_timeout 3600s;",
                f"proxy_pass http://127.0.0.1:{port}{path};",
            ],
        )
    return lines


def told(kind: str, secret: str | None) -> list[str]:
    """What a service is told of the caller, in place of whatever the caller said. Without a secret: nothing."""
    values = {
        PROXY_HEADER: f'"{secret}"' if secret else '""',
        SITE_HEADER: "$fedsplit_site" if secret else '""',
        SERIAL_HEADER: "$fedsplit_serial" if secret else '""',
        "x-real-ip": "$remote_addr",
    }
    return [f"{kind}_set_header {name} {value};" for name, value in values.items()]


def _only(method: str) -> list[str]:
    also = "GET|HEAD" if method == "GET" else method
    return [f'if ($request_method !~ "^(?:{also})$") {{ return 405; }}']


def errors(kind: str) -> list[str]:
    return [f"error_page {code} = @{kind}_{code};" for code in _KINDS]


def error_locations() -> list[str]:
    """An error in JSON, and in gRPC's own form, which needs a status without a body."""
    lines = []
    for code, (kind, text) in _KINDS.items():
        body = f'{{"error": {{"kind": "{kind}", "message": "{text}"}}}}'
        lines += block(
            f"location @json_{code}", ["default_type application/json;", f"return {code} '{body}';"]
        )
        lines += block(
            f"location @grpc_{code}",
            [
                "default_type application/grpc;",
                f"add_header grpc-status {_GRPC[code]} always;",
                f'add_header grpc-message "{text}" always;',
                "return 204;",
            ],
        )
    return lines


def block(head: str, lines: list[str]) -> list[str]:
    return [f"{head} {{", *(f"    {line}" for line in lines), "}"]


def quoted(path: Path) -> str:
    """A path as nginx reads it. Raises ConfigError for one that it would read as something else."""
    text = str(path)
    if not path.is_absolute() or re.search(r"[\x00-\x1f\"\\\\$]", text):
        raise ConfigError(
            f"nginx cannot use the path {text!r}: no quotation mark, backslash or $ may stand in it; move the folder"
        )
    return f'"{text}"'
