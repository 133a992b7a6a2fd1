"""What the public port does, as an nginx.conf: which paths go where, who must show a certificate, what the services are told.

Everything that is not listed here is 404 from nginx itself. Paths match by their plain spelling only. What a caller says
under the proxy's headers never reaches a service. The numbers' reasons: docs/adr/0021-one-public-port.md.
"""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.core.proxied import PROXY_HEADER, REASON_HEADER, SERIAL_HEADER, SITE_HEADER
from fedsplit.plant import paths
from fedsplit.plant.server.folder import FederationFolder

_MAX_WORKERS = 4
_TEMPORARY = ("fastcgi", "uwsgi", "scgi")
_EXPIRED = (
    "this site's certificate has expired: join again with a new code, `fedsplit site join CODE`"
)
_WHY = {
    "NONE": "a client certificate is wanted and none came: join first, `fedsplit site join CODE`",
    "~expired": _EXPIRED,
    "~not yet valid": "this site's certificate is not valid yet: set the clock of the site or of the server",
    "default": "this client certificate is not of this federation: join it, `fedsplit site join CODE`",
}
_REFUSED = "this site's access was revoked or its certificate replaced: ask the operator, and join again with a new code"
_KINDS = {
    403: ("RefusedError", "$fedsplit_refusal"),
    404: ("NotFound", "nothing answers at this path"),
    405: ("ProtocolError", "the method is not allowed at this path"),
    413: ("ProtocolError", "the body is larger than this path allows"),
    500: ("UnreachableError", "the server cannot answer now; try again"),
    502: ("UnreachableError", "a service of the server does not answer; try again"),
    503: ("OverloadedError", "too many requests from this address; try again"),
    504: ("UnreachableError", "a service of the server did not answer in time; try again"),
}
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


def render(
    folder: FederationFolder,
    ports: Ports,
    *,
    secret: str,
    version: tuple[int, int, int],
    without: Collection[str] = (),
) -> str:
    """The whole nginx.conf. `version` is nginx's; it was built `without` some modules. Raises ConfigError.

    `secret` is what the services know the proxy by.
    """
    home = folder.nginx_conf.parent / "nginx"
    temporary = [
        f"{name}_temp_path {_quoted(home / name)};"
        for name in _TEMPORARY
        if f"http_{name}_module" not in without
    ]
    http = [
        f"client_body_temp_path {_quoted(home / 'body')};",
        f"proxy_temp_path {_quoted(home / 'proxy')};",
        *temporary,
        "access_log off;",
        "server_tokens off;",
        "default_type application/octet-stream;",
        *_maps(),
        *_limits(version),
        *_server(folder, ports, secret, version),
    ]
    return "\n".join(
        [
            "# Made by fedsplit from federation.toml at each start. Change that file, not this one.",
            *_as_owner(folder.path),
            "daemon off;",
            f"worker_processes {min(os.cpu_count() or 1, _MAX_WORKERS)};",
            f"pid {_quoted(home / 'nginx.pid')};",
            "error_log stderr warn;",
            *_block("events", ["worker_connections 1024;"]),
            *_block("http", http),
            "",
        ]
    )


def _as_owner(folder: Path) -> list[str]:
    """As root the workers run as the folder's owner, who may reach what lies in it."""
    if os.geteuid() != 0:
        return []
    stat = folder.stat()
    try:
        name = pwd.getpwuid(stat.st_uid).pw_name
    except KeyError as error:
        raise ConfigError(
            f"{folder} belongs to user {stat.st_uid}, whom this machine does not know: `chown` it to one that it knows"
        ) from error
    return [f"user {name};"]


def _maps() -> list[str]:
    """What is known of a caller and a request, once for all locations."""
    name = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
    return [
        # Another spelling of a listed path is another path: no escapes, no double slashes, no dots.
        *_map("$request_uri", "$fedsplit_odd", {"default": "0", r"~^[^?]*(?:%|//|\.\.|\./)": "1"}),
        # Only a certificate that nginx has verified has a name. The name stands first, and is a plain one.
        *_map(
            '"$ssl_client_verify $ssl_client_s_dn"',
            "$fedsplit_site",
            {"default": "", f"~^SUCCESS CN=(?<fedsplit_cn>{name})(?:,|$)": "$fedsplit_cn"},
        ),
        *_map(
            '"$ssl_client_verify $ssl_client_serial"',
            "$fedsplit_serial",
            {"default": "", "~^SUCCESS (?<fedsplit_number>[0-9A-F]{1,40})$": "$fedsplit_number"},
        ),
        *_map("$fedsplit_site", "$fedsplit_nameless", {"default": "0", "": "1"}),
        # Why a caller with a verified certificate is refused: in the control service's words where it has some.
        *_map(
            "$fedsplit_reason",
            "$fedsplit_denied",
            {
                "default": _REFUSED,
                # No quotation mark and no backslash, for the words go into JSON.
                r"~^(?<fedsplit_words>[ !#-\[\]-~]{1,3000})$": "$fedsplit_words",
            },
        ),
        *_map("$ssl_client_verify", "$fedsplit_refusal", _WHY | {"SUCCESS": "$fedsplit_denied"}),
        *_map(
            "$content_type",
            "$fedsplit_no_certificate",
            {"default": "@json_403", "~^application/grpc": "@grpc_403"},
        ),
    ]


def _limits(version: tuple[int, int, int]) -> list[str]:
    """Sizes, times and rates that hold on every path unless it says otherwise."""
    old = ["http2_max_field_size 16k;", "http2_max_header_size 64k;", "http2_max_requests 10000;"]
    return [
        "limit_req_zone $binary_remote_addr zone=fedsplit_sites:1m rate=200r/s;",
        "limit_req_zone $binary_remote_addr zone=fedsplit_join:1m rate=2r/s;",
        "limit_req_zone $binary_remote_addr zone=fedsplit_page:1m rate=20r/s;",
        "limit_conn_zone $binary_remote_addr zone=fedsplit_calls:1m;",
        # SuperNodes try again after a 503 and give up after a 429.
        "limit_req_status 503;",
        "limit_conn_status 503;",
        "limit_conn fedsplit_calls 256;",
        "client_header_timeout 20s;",
        "client_body_timeout 60s;",
        "send_timeout 60s;",
        "keepalive_timeout 75s;",
        "keepalive_requests 10000;",
        # Tokens stand in headers.
        "large_client_header_buffers 8 32k;",
        "client_max_body_size 64k;",
        "proxy_http_version 1.1;",
        "proxy_connect_timeout 5s;",
        "proxy_read_timeout 120s;",
        "proxy_max_temp_file_size 0;",
        "reset_timedout_connection on;",
        *(old if version < (1, 19, 7) else []),
    ]


def _server(
    folder: FederationFolder, ports: Ports, secret: str, version: tuple[int, int, int]
) -> list[str]:
    told = _told("proxy", secret)
    return _block(
        "server",
        [
            *_listens(folder.settings.server.bind, folder.settings.server.port, version),
            "server_name _;",
            f"ssl_certificate {_quoted(folder.certificate)};",
            f"ssl_certificate_key {_quoted(folder.certificate_key)};",
            "ssl_protocols TLSv1.2 TLSv1.3;",
            # A resumed session would keep a certificate in force that has ended meanwhile.
            "ssl_session_cache off;",
            "ssl_session_tickets off;",
            f"ssl_client_certificate {_quoted(folder.ca)};",
            "ssl_verify_client optional;",
            # Large tensors: 0.61 of a direct plaintext connection, 0.30 with nginx's defaults.
            "ssl_buffer_size 64k;",
            "http2_chunk_size 64k;",
            "http2_body_preread_size 1m;",
            'set $fedsplit_reason "";',
            *_errors("json"),
            "error_page 495 496 = $fedsplit_no_certificate;",
            "if ($fedsplit_odd) { return 404; }",
            *_fleet(folder, ports.superlink),
            *_encoder(ports.encoder, secret),
            *_control(ports.control, told),
            *(_page(folder, ports.control, told) if folder.settings.page.public else []),
            *_block("location /", ["return 404;"]),
            *_error_locations(),
        ],
    )


def _listens(bind: str, port: int, version: tuple[int, int, int]) -> list[str]:
    # A peer that is gone without a word is noticed after 20 s.
    how = "ssl so_keepalive=10s:5s:2"
    if version < (1, 25, 1):
        how += " http2"
    hosts = [f"[{bind}]" if ":" in bind else bind] if bind else ["0.0.0.0"]
    if not bind and _has_ipv6():
        hosts.append("[::]")
    listens = [f"listen {host}:{port} {how};" for host in hosts]
    return listens if version < (1, 25, 1) else [*listens, "http2 on;"]


def _has_ipv6() -> bool:
    """May a port be opened on an address of IPv6 here?"""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _fleet(folder: FederationFolder, port: int) -> list[str]:
    """Flower's Fleet API. SuperNodes have no client certificates; the SuperLink checks their keys."""
    lines = []
    for call in paths.FLEET_CALLS:
        # Flower cuts arrays into objects of 5 MiB.
        most = "16m" if call == "push-object" else "4m"
        lines += _block(
            f"location = {paths.FLEET}/{call}",
            [
                *_only("POST"),
                f"client_max_body_size {most};",
                "limit_req zone=fedsplit_sites burst=400 nodelay;",
                *_told("proxy", None),
                "proxy_ssl_verify on;",
                f"proxy_ssl_trusted_certificate {_quoted(folder.ca)};",
                "proxy_ssl_name localhost;",
                "proxy_ssl_server_name on;",
                f"proxy_pass https://127.0.0.1:{port}{paths.FLEET}/{call};",
            ],
        )
    return lines


def _encoder(port: int, secret: str) -> list[str]:
    """Our gRPC calls. A stream lives for a round and carries as much as it likes; the encoder bounds it."""
    lines = []
    for call in paths.ENCODER_CALLS:
        lines += _block(
            f"location = {call}",
            [
                *_errors("grpc"),
                *_only("POST"),
                "if ($fedsplit_nameless) { return 403; }",
                *_ASKED,
                "client_max_body_size 0;",
                "client_body_buffer_size 1m;",
                "client_body_timeout 3600s;",
                "send_timeout 3600s;",
                "grpc_connect_timeout 5s;",
                "grpc_read_timeout 3600s;",
                "grpc_send_timeout 3600s;",
                "grpc_buffer_size 256k;",
                *_told("grpc", secret),
                f"grpc_pass grpc://127.0.0.1:{port};",
            ],
        )
    return lines


def _control(port: int, told: list[str]) -> list[str]:
    """The control service's paths. It knows who is a member, and says why not on `renew` and `report` itself."""
    to = f"proxy_pass http://127.0.0.1:{port}"
    open_to_all = [*told, "limit_req zone=fedsplit_join burst=20 nodelay;"]
    certified = [
        *told,
        "if ($fedsplit_nameless) { return 403; }",
        "limit_req zone=fedsplit_sites burst=400 nodelay;",
    ]
    members = [
        *certified,
        *_ASKED,
    ]
    file = "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
    ask = [
        "internal;",
        *told,
        "proxy_pass_request_body off;",
        'proxy_set_header Content-Length "";',
        f"{to}{paths.AUTHORISE};",
    ]
    return [
        *_block(f"location = {paths.HELLO}", [*_only("GET"), *open_to_all, f"{to}{paths.HELLO};"]),
        *_block(f"location = {paths.JOIN}", [*_only("POST"), *open_to_all, f"{to}{paths.JOIN};"]),
        *_block(f"location = {paths.RENEW}", [*_only("POST"), *certified, f"{to}{paths.RENEW};"]),
        *_block(f"location = {paths.REPORT}", [*_only("POST"), *certified, f"{to}{paths.REPORT};"]),
        *_block(
            f"location = {paths.MANIFEST}", [*_only("GET"), *members, f"{to}{paths.MANIFEST};"]
        ),
        *_block(f'location ~ "^{paths.FILES}/{file}$"', [*_only("GET"), *members, f"{to};"]),
        *_block(
            f'location ~ "^{paths.TENSORS}/[0-9a-f]{{64}}$"', [*_only("GET"), *members, f"{to};"]
        ),
        *_block(f"location = {_ASK}", ask),
    ]


_PAGE = {"": "/", "events": "/events", "status.json": "/status.json"}


def _page(folder: FederationFolder, port: int, told: list[str]) -> list[str]:
    """The status page, with a login. Its events go on for as long as somebody looks."""
    lines = []
    for shown, path in _PAGE.items():
        lines += _block(
            f"location = /status/{shown}",
            [
                *_only("GET"),
                "limit_req zone=fedsplit_page burst=40 nodelay;",
                'auth_basic "fedsplit";',
                f"auth_basic_user_file {_quoted(folder.nginx_conf.parent / 'nginx' / 'page.login')};",
                *told,
                "proxy_buffering off;",
                "proxy_read_timeout 3600s;",
                f"proxy_pass http://127.0.0.1:{port}{path};",
            ],
        )
    return lines


def _told(kind: str, secret: str | None) -> list[str]:
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


def _errors(kind: str) -> list[str]:
    return [f"error_page {code} = @{kind}_{code};" for code in _KINDS]


def _error_locations() -> list[str]:
    """An error in JSON, and in gRPC's own form, which needs a status without a body."""
    lines = []
    for code, (kind, text) in _KINDS.items():
        body = f'{{"error": {{"kind": "{kind}", "message": "{text}"}}}}'
        lines += _block(
            f"location @json_{code}", ["default_type application/json;", f"return {code} '{body}';"]
        )
        lines += _block(
            f"location @grpc_{code}",
            [
                "default_type application/grpc;",
                f"add_header grpc-status {_GRPC[code]} always;",
                f'add_header grpc-message "{text}" always;',
                "return 204;",
            ],
        )
    return lines


def _map(of: str, to: str, cases: dict[str, str]) -> list[str]:
    return _block(f"map {of} {to}", [f'"{case}" "{value}";' for case, value in cases.items()])


def _block(head: str, lines: list[str]) -> list[str]:
    return [f"{head} {{", *(f"    {line}" for line in lines), "}"]


def _quoted(path: Path) -> str:
    """A path as nginx reads it. Raises ConfigError for one that it would read as something else."""
    text = str(path)
    if not path.is_absolute() or re.search(r"[\x00-\x1f\"\\\\$]", text):
        raise ConfigError(
            f"nginx cannot use the path {text!r}: no quotation mark, backslash or $ may stand in it; move the folder"
        )
    return f'"{text}"'
