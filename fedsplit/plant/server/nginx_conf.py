"""What the public port does, as an nginx.conf: which paths go where, who must show a certificate, what the services are told.

Everything that is not listed here is 404 from nginx itself. Paths match by their plain spelling only. What a caller says
under the proxy's headers never reaches a service. The numbers' reasons: docs/adr/0021-one-public-port.md.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
from collections.abc import Collection
from pathlib import Path

from fedsplit.core.errors import ConfigError
from fedsplit.plant.server.folder import FederationFolder
from fedsplit.plant.server.nginx_locations import (
    Ports,
    block,
    control,
    encoder,
    error_locations,
    errors,
    fleet,
    page,
    quoted,
    superlink,
    told,
)

__all__ = ["Ports", "render"]

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
_KIND = {
    "NONE": "no-certificate",
    "~expired": "certificate-expired",
    "~not yet valid": "certificate-not-yet-valid",
    "default": "certificate-foreign",
    "SUCCESS": "certificate-foreign",
}
_REFUSED = "the certificate names no site of this federation, or is no longer in force: ask the operator for a new join code"


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
        f"{name}_temp_path {quoted(home / name)};"
        for name in _TEMPORARY
        if f"http_{name}_module" not in without
    ]
    http = [
        f"client_body_temp_path {quoted(home / 'body')};",
        f"proxy_temp_path {quoted(home / 'proxy')};",
        *temporary,
        "access_log off;",
        "server_tokens off;",
        "default_type application/octet-stream;",
        *_maps(),
        *_limits(version),
        *superlink(ports.superlink),
        *_server(folder, ports, secret, version),
    ]
    return "\n".join(
        [
            "# Made by fedsplit from federation.toml at each start. Change that file, not this one.",
            *_as_owner(folder.path),
            "daemon off;",
            f"worker_processes {min(os.cpu_count() or 1, _MAX_WORKERS)};",
            f"pid {quoted(home / 'nginx.pid')};",
            "error_log stderr error;",
            *block("events", ["worker_connections 1024;"]),
            *block("http", http),
            "",
        ]
    )


def _as_owner(folder: Path) -> list[str]:
    """As root the workers run as the folder's owner, who may reach what lies in it."""
    if os.geteuid() != 0:
        return []
    stat = folder.stat()
    try:
        user, group = pwd.getpwuid(stat.st_uid).pw_name, grp.getgrgid(stat.st_gid).gr_name
    except KeyError as error:
        raise ConfigError(
            f"{folder} belongs to user {stat.st_uid} and group {stat.st_gid}, whom this machine does not know: `chown` it to "
            "some that it knows"
        ) from error
    return [f"user {user} {group};"]


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
        *_map("$ssl_client_verify", "$fedsplit_kind", _KIND),
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
    proxied = told("proxy", secret)
    return block(
        "server",
        [
            *_listens(folder.settings.server.bind, folder.settings.server.port, version),
            "server_name _;",
            f"ssl_certificate {quoted(folder.certificate)};",
            f"ssl_certificate_key {quoted(folder.certificate_key)};",
            "ssl_protocols TLSv1.2 TLSv1.3;",
            # A resumed session would keep a certificate in force that has ended meanwhile.
            "ssl_session_cache off;",
            "ssl_session_tickets off;",
            f"ssl_client_certificate {quoted(folder.ca)};",
            "ssl_verify_client optional;",
            # Large tensors: 0.61 of a direct plaintext connection, 0.30 with nginx's defaults.
            "ssl_buffer_size 64k;",
            "http2_chunk_size 64k;",
            "http2_body_preread_size 1m;",
            'set $fedsplit_reason "";',
            *errors("json"),
            "error_page 495 496 = $fedsplit_no_certificate;",
            "if ($fedsplit_odd) { return 404; }",
            *fleet(folder, ports.superlink),
            *encoder(ports.encoder, secret),
            *control(ports.control, proxied),
            *(page(folder, ports.control, proxied) if folder.settings.page.public else []),
            *block("location /", ["return 404;"]),
            *error_locations(),
        ],
    )


def _listens(bind: str, port: int, version: tuple[int, int, int]) -> list[str]:
    # A machine that is gone without a word is noticed after 16 s; without it, not within minutes.
    how = "ssl so_keepalive=8s:4s:2"
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


def _map(of: str, to: str, cases: dict[str, str]) -> list[str]:
    return block(f"map {of} {to}", [f'"{case}" "{value}";' for case, value in cases.items()])
