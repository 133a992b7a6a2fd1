"""Signed tokens: what a site (`sign`) or the ServerApp (`sign_publisher`) may ask of the encoder.

The ServerApp signs with a key that it shares with the encoder and sends a site's token inside its authenticated Flower
message. A token to predict has an audience of its own; a federation's control service signs it, or `fedsplit encoder
grant`. Tokens travel in gRPC metadata; keep them out of logs and argv.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, NamedTuple

import jwt
from pydantic import ValidationError

from fedsplit.core.encoder import Grant
from fedsplit.core.errors import ConfigError, RefusedError
from fedsplit.core.foreign import printable

ISSUER = "fedsplit"
SITE_AUDIENCE = "fedsplit-encoder"
INFERENCE_AUDIENCE = "fedsplit-inference"
PUBLISHER_AUDIENCE = "fedsplit-publisher"
MIN_KEY_BYTES = 32
LEEWAY_S = 60.0

_ALGORITHM = "HS256"
_MAX_TOKEN_BYTES = 8192
_REQUIRED = ["iss", "aud", "exp", "iat", "jti", "sub"]


class SiteToken(NamedTuple):
    """A verified site token."""

    grant: Grant
    id: str
    expires: float
    """Seconds since the epoch."""


def check_key(key: bytes) -> None:
    """Raise ConfigError for a key that HS256 should not be used with."""
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(
            f"the encoder's token key has {len(key)} bytes, {MIN_KEY_BYTES} or more are wanted: "
            "make one with `python -c 'import secrets; print(secrets.token_hex(32))'`"
        )


def sign(grant: Grant, key: bytes, ttl_s: float) -> str:
    """A token that lets its bearer, for `ttl_s` seconds, do what `grant` says. Raises ConfigError for a weak key."""
    # Tokens travel in a header with every call, so what is as always is left out.
    claims = grant.model_dump(exclude_defaults=True)
    return _sign(_audience(grant), grant.site, key, ttl_s, {"grant": claims})


def sign_publisher(run: str, key: bytes, ttl_s: float) -> str:
    """A token for the ServerApp of `run`: Publish and Capabilities. Raises ConfigError for a weak key."""
    return _sign(PUBLISHER_AUDIENCE, run, key, ttl_s, {})


def verify(token: str, key: bytes, *, leeway_s: float = LEEWAY_S) -> Grant:
    """The grant of a site's token. Raises RefusedError that says what is wrong with it."""
    return verify_site(token, key, leeway_s=leeway_s).grant


def verify_site(token: str, key: bytes, *, leeway_s: float = LEEWAY_S) -> SiteToken:
    """Like `verify`, with the token's id and end."""
    return _site_token(_verify([SITE_AUDIENCE, INFERENCE_AUDIENCE], token, key, leeway_s))


def verify_publisher(token: str, key: bytes, *, leeway_s: float = LEEWAY_S) -> str:
    """The run of a publisher's token. Raises RefusedError that says what is wrong with it."""
    run: str = _verify(PUBLISHER_AUDIENCE, token, key, leeway_s)["sub"]
    return run


def verify_any(token: str, key: bytes, *, leeway_s: float = LEEWAY_S) -> SiteToken | str:
    """A site's token, or the run of a publisher's. Raises RefusedError where it is neither."""
    audiences = [SITE_AUDIENCE, INFERENCE_AUDIENCE, PUBLISHER_AUDIENCE]
    claims = _verify(audiences, token, key, leeway_s)
    return str(claims["sub"]) if claims["aud"] == PUBLISHER_AUDIENCE else _site_token(claims)


def _audience(grant: Grant) -> str:
    return SITE_AUDIENCE if grant.inference is None else INFERENCE_AUDIENCE


def _site_token(claims: dict[str, Any]) -> SiteToken:
    try:
        grant = Grant.model_validate(claims.get("grant"))
    except ValidationError as error:
        raise RefusedError(
            "the token's grant is not one that this fedsplit knows: install the same fedsplit on both sides"
        ) from error
    if claims["aud"] != _audience(grant):
        raise RefusedError(
            f"the token is for {printable(claims['aud'], limit=80)}, its grant for {_audience(grant)}: a run's token does not "
            "predict, and a token to predict does not train"
        )
    return SiteToken(grant, claims["jti"], float(claims["exp"]))


def _sign(audience: str, subject: str, key: bytes, ttl_s: float, more: dict[str, Any]) -> str:
    check_key(key)
    now = time.time()
    claims = {
        "iss": ISSUER, "aud": audience, "sub": subject, "jti": uuid.uuid4().hex, "iat": now, "exp": now + ttl_s,
    }  # fmt: skip
    return jwt.encode(claims | more, key, algorithm=_ALGORITHM)


def _verify(audience: str | list[str], token: str, key: bytes, leeway_s: float) -> dict[str, Any]:
    check_key(key)
    if len(token) > _MAX_TOKEN_BYTES:
        raise RefusedError(
            f"a token of {len(token)} bytes: at most {_MAX_TOKEN_BYTES} are looked at"
        )
    # PyJWT checks the signature first; times are checked below, where the message can say by how much.
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[_ALGORITHM],
            issuer=ISSUER,
            audience=audience,
            options={
                "require": _REQUIRED,
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
            },
        )
    except jwt.InvalidSignatureError as error:
        raise RefusedError(
            "the token's signature is wrong: the encoder and the ServerApp must share the same key "
            "(encoder-secret-file of the run, --secret-file of `fedsplit encoder serve`)"
        ) from error
    except jwt.InvalidAudienceError as error:
        raise RefusedError(
            f"the token is for something else: one for {audience!r} is wanted "
            "(sites get theirs from the ServerApp; publishing needs a publisher's token)"
        ) from error
    except jwt.InvalidTokenError as error:
        # Its words may quote the token's header, which anybody can write.
        text = printable(error, limit=200)
        raise RefusedError(f"the token is not a valid one: {text}") from error
    _check_times(claims, leeway_s)
    return claims


def _check_times(claims: dict[str, Any], leeway_s: float) -> None:
    now = time.time()
    try:
        issued, expires = float(claims["iat"]), float(claims["exp"])
    except (TypeError, ValueError, OverflowError) as error:
        raise RefusedError("the token's times are no numbers") from error
    if not issued <= now + leeway_s:
        raise RefusedError(
            f"the token is not valid yet: your clock and the server's differ by {issued - now:.0f} s "
            f"({leeway_s:.0f} s are tolerated); set the clocks of the ServerApp's and the encoder's machines"
        )
    if not now < expires + leeway_s:
        raise RefusedError(
            f"the token expired {now - expires:.0f} s ago (it was issued {now - issued:.0f} s ago). If it is a fresh "
            f"one, your clock and the server's differ by about {now - issued:.0f} s: set them; else ask for a new token"
        )
