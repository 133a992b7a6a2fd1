"""Tokens: what is refused, and whether the message says why."""

from __future__ import annotations

import time

import jwt
import pytest
from pydantic import ValidationError

from fedsplit.core.encoder import EncoderTraining
from fedsplit.core.errors import ConfigError, RefusedError
from fedsplit.transport import tokens
from fedsplit.transport.server import EncoderServer
from fedsplit.transport.tokens import sign, sign_publisher, verify, verify_publisher
from tests.transport.conftest import KEY, StreamEncoder, make_grant, token_for


def test_round_trip() -> None:
    assert verify(sign(make_grant(), KEY, 60), KEY) == make_grant()
    assert verify_publisher(sign_publisher("run", KEY, 60), KEY) == "run"


TRAINING = EncoderTraining(mode="shared", learning_rate=3e-4, weight=0.125, clip_norm=1.0)


def test_training_is_signed_and_small() -> None:
    grant = make_grant(training=TRAINING)
    token = sign(grant, KEY, 60)
    assert verify(token, KEY) == grant
    assert len(token) - len(sign(make_grant(), KEY, 60)) < 140
    assert (
        "training"
        not in jwt.decode(sign(make_grant(), KEY, 60), options={"verify_signature": False})["grant"]
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "frozen"},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"weight": 0.0},
        {"weight": 1.5},
        {"queries": 0},
        {"queries": 10**6},
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"seed": -1},
        {"seed": 1 << 63},
        {"lora": "C"},
        {"more": 1},
    ],
)
def test_training_that_no_token_may_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_grant(training=TRAINING.model_dump() | wrong)
    grant = make_grant().model_dump() | {"training": TRAINING.model_dump() | wrong}
    with pytest.raises(RefusedError, match="grant is not one"):
        verify(_forged(grant=grant), KEY)


def test_each_token_has_an_id_of_its_own() -> None:
    ids = {tokens.verify_site(sign(make_grant(), KEY, 60), KEY).id for _ in range(10)}
    assert len(ids) == 10


@pytest.mark.parametrize("key", [b"", b"x" * 31])
def test_weak_keys(key: bytes) -> None:
    for use in (
        lambda: sign(make_grant(), key, 60),
        lambda: sign_publisher("run", key, 60),
        lambda: verify("t", key),
    ):
        with pytest.raises(ConfigError, match="32 or more"):
            use()
    with pytest.raises(ConfigError, match="32 or more"):
        EncoderServer(None, key=key)  # type: ignore[arg-type]


def _at(monkeypatch: pytest.MonkeyPatch, offset_s: float) -> None:
    monkeypatch.undo()
    now = time.time()
    monkeypatch.setattr(tokens.time, "time", lambda: now + offset_s)


def test_expired(monkeypatch: pytest.MonkeyPatch) -> None:
    token = sign(make_grant(), KEY, 100)
    _at(monkeypatch, 159)
    assert verify(token, KEY) == make_grant()  # within the leeway
    _at(monkeypatch, 300)
    with pytest.raises(
        RefusedError, match=r"expired 200 s ago .*your clock and the server's differ by about 300 s"
    ):
        verify(token, KEY)


def test_not_valid_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    token = sign(make_grant(), KEY, 100)
    _at(monkeypatch, -59)
    assert verify(token, KEY) == make_grant()
    _at(monkeypatch, -600)
    with pytest.raises(
        RefusedError, match=r"not valid yet: your clock and the server's differ by 600 s"
    ):
        verify(token, KEY)


def _forged(**changes: object) -> str:
    now = time.time()
    claims = {
        "iss": "fedsplit", "aud": "fedsplit-encoder", "sub": "site-1", "jti": "1", "iat": now, "exp": now + 60,
        "grant": make_grant().model_dump(),
    } | changes  # fmt: skip
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, KEY, algorithm="HS256")


BAD = {
    "another key": (lambda: sign(make_grant(), KEY[::-1], 60), "signature is wrong"),
    "changed": (lambda: _swapped(), "signature is wrong"),
    "garbage": (lambda: "a.b.c", "not a valid one"),
    "empty": (lambda: "", "not a valid one"),
    "no algorithm": (
        lambda: jwt.encode({"iss": "fedsplit"}, None, algorithm="none"),
        "not a valid one",
    ),
    "another audience": (lambda: sign_publisher("run", KEY, 60), "for something else"),
    "another issuer": (lambda: _forged(iss="x"), "issuer"),
    "no id": (lambda: _forged(jti=None), "jti"),
    "no expiry": (lambda: _forged(exp=None), "exp"),
    "no issue time": (lambda: _forged(iat=None), "iat"),
    "expiry is NaN": (lambda: _forged(exp=float("nan")), "expired"),
    "issued is text": (lambda: _forged(iat="now"), "no numbers"),
    "no grant": (lambda: _forged(grant=None), "grant is not one"),
    "grant of another fedsplit": (lambda: _forged(grant={"run": "r"}), "grant is not one"),
    "too long": (lambda: "x" * 9000, "at most 8192"),
}


def _swapped() -> str:
    one, other = sign(make_grant(), KEY, 60), sign(make_grant(max_steps=10**9), KEY, 60)
    return ".".join((one.split(".")[0], other.split(".")[1], one.split(".")[2]))


@pytest.mark.parametrize(("make", "says"), BAD.values(), ids=BAD.keys())
def test_bad_tokens(make: object, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        verify(make(), KEY)  # type: ignore[operator]


def test_a_sites_token_does_not_publish() -> None:
    with pytest.raises(RefusedError, match="publisher"):
        verify_publisher(token_for(make_grant()), KEY)


def test_the_server_refuses_and_says_why(server: EncoderServer) -> None:
    for token, says in (
        (sign(make_grant(), KEY, -100), "expired"),
        ("", "no token"),
        ("x y", "not a valid"),
    ):
        with pytest.raises(RefusedError, match=says):
            StreamEncoder(server.address, token, make_grant())
    assert server.stats().refused == {"token": 3}
    assert server.stats().sessions == 0


def test_a_grant_of_the_clients_own_is_refused(server: EncoderServer) -> None:
    with pytest.raises(RefusedError, match=r"cut is 0,12, the token's is 2,10"):
        StreamEncoder(server.address, token_for(make_grant()), make_grant(a=0, b=12))


def test_tokens_stay_out_of_the_log(
    server: EncoderServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    good, bad = token_for(make_grant()), sign(make_grant(), KEY, -100)
    StreamEncoder(server.address, good, make_grant()).close()
    with pytest.raises(RefusedError):
        StreamEncoder(server.address, bad, make_grant())
    assert good.split(".")[1] not in caplog.text
    assert bad.split(".")[1] not in caplog.text
