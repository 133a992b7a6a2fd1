"""Flower's private names that an executor of our own needs: the Runtime API of a SuperNode, and what a SuperLink says of a run.

A SuperNode started with `--isolation process` hands its messages to whoever holds the SuperExec secret: a task is
acquired, its input pulled, heartbeats sent, the reply pushed, the task finished. Flower's own two programs that do so
(flower-superexec and flwr-clientapp) start a process a message; executor.py is one process for all of them.
The bundle that comes with a task is left where it is: a site runs what is installed.

Nothing else of fedsplit knows these names. `misfits` says what an installed Flower lacks of them.
Raises SuperNodeError for what may pass, ConfigError for what somebody has to change.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsplit.core.closing import Closing
from fedsplit.core.errors import ConfigError, SuperNodeError
from fedsplit.core.foreign import parse_json, printable

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_CALL_S, _ASK_S = 30.0, 5.0
# A SuperNode makes the task a moment before it has the message.
_MESSAGE_S, _LOOK_S = 10.0, 0.05
_MAX_NOTE_BYTES = 1 << 20


def misfits() -> list[str]:
    """What this file counts on and the installed Flower does not have, beyond the names that importing it has found."""
    calls = (
        "AcquireTask", "SendTaskHeartbeat", "PullTaskInput", "PullMessages", "PullObject", "ConfirmMessageReceived",
        "PushMessages", "PushObject", "PushTaskOutput",
    )  # fmt: skip
    fields: dict[Any, tuple[str, ...]] = {
        AcquireTaskRequest: ("supported_task_types",),
        AcquireTaskResponse: ("task", "token"),
        PullTaskInputResponse: ("context", "run"),
        PushAppMessagesRequest: ("messages_list", "message_object_trees"),
        PushTaskOutputRequest: ("sub_status", "details"),
    }
    missing = [f"RuntimeHttpClient.{n}" for n in calls if not hasattr(RuntimeHttpClient, n)]
    missing += [
        f"{model.DESCRIPTOR.name}.{name}"
        for model, names in fields.items()
        for name in names
        if name not in model.DESCRIPTOR.fields_by_name
    ]
    if not isinstance(getattr(_client("127.0.0.1:1", []), "_client", None), httpx.Client):
        missing.append("RuntimeHttpClient._client")
    return missing


@dataclass(frozen=True)
class Work:
    """What a task is: a message to answer, and the site's side of its run."""

    message: Message
    context: Context
    app: str
    """The app whose message it is, as its bundle names it: publisher/name."""


class RuntimeApi(Closing):
    """The Runtime API of the SuperNode on this machine, for whoever holds its secret. One caller at a time."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        auth = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
        self._client = _client(address, [_Version("SuperExec"), auth])

    def acquire(self) -> Claim | None:
        """The oldest task that waits, or None."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        with _in_words(self._address, task=False):
            answer = self._client.AcquireTask(request)
        if not answer.HasField("task") or not answer.token:
            return None
        return Claim(self._address, answer.token)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Claim(Closing):
    """One task that is ours until it is finished, or until no heartbeat comes for a minute. Close it."""

    def __init__(self, address: str, token: str) -> None:
        self._address, self._token = address, token
        interceptors = [_Version("flwr-clientapp"), RuntimeTokenHttpInterceptor(token)]
        self._client = _client(address, interceptors)

    def pull(self) -> Work:
        """What there is to do. From here on the SuperNode counts the task as begun."""
        with _in_words(self._address, task=True):
            given = self._client.PullTaskInput(PullTaskInputRequest())
            context = context_from_proto(given.context)
            message = self._message(context)
        return Work(message, context, printable(given.run.fab_id, limit=200))

    def beat(self) -> None:
        """Say that the work goes on. Raises SuperNodeError; `lost` once nobody waits for it any more."""
        with _in_words(self._address, task=True):
            answer = self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        if not answer.success:
            raise SuperNodeError("the SuperNode counts on this order no more", lost=True)

    def push(self, reply: Message) -> None:
        """Hand over the reply. May be tried again after an error that is not `lost`."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = message_to_proto(remove_content_from_message(reply))
        run_id, node = reply.metadata.run_id, Node(node_id=reply.metadata.src_node_id)
        with _in_words(self._address, task=True), no_object_id_recompute():
            tree = get_object_tree(reply)
            request = PushAppMessagesRequest(messages_list=[head], message_object_trees=[tree])
            wanted = self._client.PushMessages(request)
            push = make_push_object_fn_protobuf(
                self._client.PushObject, node, run_id=run_id, session_id=wanted.session_id
            )
            push_objects(
                get_all_nested_objects(reply), push, object_ids_to_push=set(wanted.objects_to_push)
            )

    def finish(self, failed: str = "") -> None:
        """Give the task back: done, or failed and why."""
        status = SubStatus.FAILED if failed else SubStatus.COMPLETED
        request = PushTaskOutputRequest(sub_status=status, details=printable(failed))
        with _in_words(self._address, task=True):
            self._client.PushTaskOutput(request)

    def note(self, message: Message) -> bytes:
        """What `left_behind` needs, should this process die. Holds the task's token: keep it from others."""
        head = message_to_proto(remove_content_from_message(message)).SerializeToString()
        words = {"token": self._token, "message": base64.b64encode(head).decode()}
        return json.dumps(words).encode()

    def close(self) -> None:
        """Close the connection; the task stays ours."""
        self._client.close()

    def _message(self, context: Context) -> Message:
        end = time.monotonic() + _MESSAGE_S
        while not (given := self._client.PullMessages(PullAppMessagesRequest())).messages_list:
            if time.monotonic() > end:
                raise SuperNodeError("the SuperNode gave a task and no message with it")
            time.sleep(_LOOK_S)
        tree, node = given.message_object_trees[0], Node(node_id=context.node_id)
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, node, context.run_id),
            make_confirm_message_received_fn_protobuf(
                self._client.ConfirmMessageReceived, node, context.run_id
            ),
            return_type=Message,
        )
        # It does not travel with its own id.
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message


def left_behind(address: str, note: bytes) -> tuple[Claim, Message] | None:
    """The task of a process that died, and its message without content, from its `note`; None where that says nothing."""
    try:
        words = parse_json(note, limit=_MAX_NOTE_BYTES)
        head = MessageProto.FromString(base64.b64decode(words["message"]))
        return Claim(address, str(words["token"])), message_from_proto(head)
    except Exception:  # noqa: BLE001 - a file that a dying process left: whatever it holds, the next order matters more
        return None


def crashed(reason: str, message: Message) -> Message:
    """The reply of a site that could not carry out an order for a reason that is no error of fedsplit's."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


class Runs(Closing):
    """What the SuperLink says of runs, asked with the site's own node key. Safe to call from several threads."""

    def __init__(self, address: str, key_file: Path, ca_file: Path | None) -> None:
        """`ca_file`: PEM of the authority behind the SuperLink's certificate; None: the system's. Raises ConfigError."""
        try:
            key = load_ssh_private_key(key_file.read_bytes(), None)
            roots = None if ca_file is None else ca_file.read_bytes()
        except (OSError, ValueError, TypeError) as err:
            raise ConfigError(
                f"the node key {key_file} or the certificate {ca_file} cannot be read: {err}; give the files that the "
                f"SuperNode is started with"
            ) from err
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{key_file} holds no elliptic-curve key, which a SuperNode needs")
        try:
            self._client = FleetHttpClient.from_server_address(
                address, False, roots, [_Version("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())]
            )  # fmt: skip
        except (OSError, ValueError) as err:
            raise ConfigError(f"the certificate {ca_file} cannot be used: {err}") from err
        # Whoever asks has heartbeats to send: a line that is cut must not keep him.
        self._client._client.timeout = httpx.Timeout(_ASK_S)

    def over(self, run_id: int, node_id: int) -> bool:
        """Has the run ended, as far as can be found out? Where nobody answers it has not."""
        request = GetRunRequest(node=Node(node_id=node_id), run_id=run_id)
        try:
            self._client.GetRun(request)
        except httpx.HTTPStatusError as err:
            return _code(err) == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
        except (httpx.HTTPError, ValueError):
            return False
        return False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class _Version:
    """Says which Flower this is. Flower's own interceptor ends the process where the other end does not like it."""

    def __init__(self, component: str) -> None:
        self._headers = dict(RuntimeVersionMetadata.from_local_component(component).as_metadata())

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers.update(self._headers)
        return call_next(context)


def _client(address: str, interceptors: list[Any]) -> RuntimeHttpClient:
    client = RuntimeHttpClient.from_server_address(address, True, None, interceptors)
    # The SuperNode is on this machine: a proxy of the environment is not for it, and there is no TLS to check.
    client._client.close()
    client._client = httpx.Client(timeout=_CALL_S, trust_env=False, verify=False)
    return client


@contextlib.contextmanager
def _in_words(address: str, *, task: bool) -> Iterator[None]:
    """Translate what Flower and HTTP raise. `task`: the call is one of a task that was ours."""
    try:
        yield
    except httpx.HTTPStatusError as err:
        code = _code(err)
        if code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
            raise ConfigError(
                f"the SuperNode at {address} runs another Flower than this: {printable(err.response.text)}; start both "
                f"from one installation"
            ) from err
        if code == ApiErrorCode.RUNTIME_AUTHENTICATION_FAILED and task:
            raise SuperNodeError("the SuperNode has forgotten this order", lost=True) from err
        if code == ApiErrorCode.RUNTIME_AUTHENTICATION_FAILED:
            raise ConfigError(
                f"the SuperNode at {address} refuses the executor's secret; start both with the same file: it is "
                f"flower-supernode's --superexec-auth-secret-file"
            ) from err
        raise SuperNodeError(
            f"the SuperNode at {address} answers {err.response.status_code}: {printable(err.response.text)}"
        ) from err
    except httpx.HTTPError as err:
        raise SuperNodeError(
            f"no SuperNode answers at {address}: {printable(err) or type(err).__name__}"
        ) from err
    except (ObjectPullError, ObjectPushError, ValueError) as err:
        raise SuperNodeError(f"the SuperNode at {address}: {printable(err)}") from err


def _code(err: httpx.HTTPStatusError) -> int | None:
    found = FlowerError.from_json(err.response.text)
    return None if found is None else int(found.code)
