"""Which SuperNodes a SuperLink lets in: their public keys, through Flower's Control API over TLS on loopback.

Flower has no public Python call for this; its command line takes seconds a key. What is private of Flower stands here
alone: the protobuf messages, three paths and two error codes, the same in 1.41 and 1.42 (tests/federation/test_control.py
runs them with the real SuperLink). A key that was taken away is never let in again; Flower itself sees to that.
"""

from __future__ import annotations

import datetime
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    RegisterNodeRequest,
    RegisterNodeResponse,
    UnregisterNodeRequest,
    UnregisterNodeResponse,
)
from google.protobuf.message import DecodeError, Message

from fedsplit.core.closing import Closing
from fedsplit.core.errors import EnrolmentError, FederationError
from fedsplit.core.foreign import parse_json, printable

TIMEOUT_S = 5.0
_PATH = "/v1/control/"
_MEDIA_TYPE = "application/protobuf"
_GONE = "unregistered"
_KEY_IN_USE, _NODE_NOT_FOUND = 23, 24
_MAX_ANSWER_BYTES = 16 * 2**20
_Answer = TypeVar("_Answer", bound=Message)


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it."""

    number: int
    name: str
    public_key: str
    """OpenSSH, without a comment."""
    status: str
    """registered | online | offline | unregistered"""
    registered: float
    """Seconds since the epoch."""

    @property
    def gone(self) -> bool:
        """Was its key taken away, for good?"""
        return self.status == _GONE


class FlowerControl(Closing):
    """The keys of one SuperLink. Calls raise FederationError where it does not answer."""

    def __init__(self, address: str, ca_file: Path) -> None:
        """`address` HOST:PORT. Raises FederationError for a CA file that cannot be read."""
        self._address = address
        try:
            tls = ssl.create_default_context(cafile=ca_file)
        except (OSError, ValueError) as err:
            raise FederationError(f"{ca_file} cannot be read as a CA's certificate: {err}") from err
        # The SuperLink is on this machine: no proxy stands between.
        self._http = httpx.Client(
            base_url=f"https://{address}{_PATH}", verify=tls, timeout=TIMEOUT_S, trust_env=False
        )

    def close(self) -> None:
        """End the connection."""
        self._http.close()

    def register(self, public_key: str, name: str = "") -> None:
        """Let a key (OpenSSH) in; one that is in stays. Raises EnrolmentError for a key that was taken away."""
        request = RegisterNodeRequest(public_key=_pem(public_key), name=name or None)
        _, code = self._call("register-node", request, RegisterNodeResponse)
        if code != _KEY_IN_USE:
            return
        if any(n.public_key == public_key and not n.gone for n in self.nodes()):
            return
        raise EnrolmentError(
            "Flower takes no node key again that was taken away once; make new keys: run `fedsplit site join` in a new "
            "folder, or with --again in its old one",
            kind="key-used",
        )

    def unregister(self, public_key: str) -> bool:
        """Take a key away, for good. False where the SuperLink does not know it, or not any more."""
        found = [n for n in self.nodes() if n.public_key == public_key and not n.gone]
        for node in found:
            request = UnregisterNodeRequest(node_id=node.number)
            self._call("unregister-node", request, UnregisterNodeResponse)
        return bool(found)

    def nodes(self) -> list[Node]:
        """All SuperNodes that have a key, those that are gone too."""
        answer, _ = self._call("list-nodes", ListNodesRequest(), ListNodesResponse)
        return [
            Node(n.node_id, n.name, _ssh_line(n.public_key), n.status, _seconds(n.registered_at))
            for n in answer.nodes_info
        ]

    def _call(self, what: str, request: Message, kind: type[_Answer]) -> tuple[_Answer, int]:
        """The answer and 0, or an empty one and the code of an error that is the caller's affair."""
        headers = {"content-type": _MEDIA_TYPE, "accept": _MEDIA_TYPE}
        try:
            found = self._http.post(what, content=request.SerializeToString(), headers=headers)
        except httpx.HTTPError as err:
            raise FederationError(
                f"the SuperLink at {self._address} does not answer ({printable(err, limit=200) or type(err).__name__}); "
                "it is starting or down, and the server's supervisor starts it again: try again in a minute"
            ) from err
        code = _code(found)
        if code in (_KEY_IN_USE, _NODE_NOT_FOUND):
            return kind(), code
        if found.is_error or len(found.content) > _MAX_ANSWER_BYTES:
            raise FederationError(
                f"the SuperLink at {self._address} refused {what}: {found.status_code} "
                f"{printable(found.text, limit=200)}; its log says more"
            )
        answer = kind()
        try:
            answer.ParseFromString(found.content)
        except DecodeError as err:
            raise FederationError(
                f"the SuperLink at {self._address} answered {what} with something else; is another program there?"
            ) from err
        return answer, 0


def _code(answer: httpx.Response) -> int:
    """Flower's number of an error, 0 for none."""
    if not answer.is_error:
        return 0
    try:
        code = parse_json(answer.content, limit=2**16)["code"]
    except (ValueError, KeyError, TypeError):
        return 0
    return code if isinstance(code, int) else 0


def _pem(line: str) -> bytes:
    key = serialization.load_ssh_public_key(line.encode())
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _ssh_line(pem: bytes) -> str:
    """Empty for a node without a key, or with one that is none of ours."""
    try:
        key = serialization.load_pem_public_key(pem)
        line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    except ValueError:
        return ""
    return line.decode("ascii")


def _seconds(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
