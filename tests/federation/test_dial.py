"""An order may ask for more than the site's own settings do, never for less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError
from fedsplit.core.orders import Stream
from fedsplit.training import dial
from fedsplit.training.site_settings import SiteSettings
from fedsplit.transport.wiring import ClientTls
from tests.transport.conftest import make_grant


def asked(monkeypatch: pytest.MonkeyPatch, node: dict[str, Any], **how: Any) -> dict[str, Any]:
    """What a stream is opened with."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(
        dial, "StreamEncoder", lambda address, *_, **options: found.update(options, address=address)
    )
    order = {
        "address": "plant:9095",
        "token": "t",
        "grant": make_grant(),
        "tls": False,
        "ca_file": "",
    }
    config = RunConfig.from_flat({"encoder-insecure": True})
    site = SiteSettings.from_node(node, node_id=7)
    dial.dial_stream(Stream.model_validate(order | how), config, site)
    return found


def test_a_site_that_wants_tls_has_it_whatever_the_order_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = asked(monkeypatch, {"data": "digits", "encoder-tls-ca": "/own/ca.pem"})
    assert found["tls"] == ClientTls(root_ca=Path("/own/ca.pem"))
    assert not found["allow_insecure"]


def test_a_certificate_of_its_own_asks_for_tls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"encoder-tls-cert": "/own/cert.pem", "encoder-tls-key": "/own/key.pem"}
    found = asked(monkeypatch, {"data": "digits", **own})
    assert found["tls"] == ClientTls(cert=Path("/own/cert.pem"), key=Path("/own/key.pem"))
    assert not found["allow_insecure"]


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder-tls-cert and encoder-tls-key go together"):
        SiteSettings.from_node({"encoder-tls-cert": "/own/cert.pem"}, node_id=1)


def test_a_deployed_site_reads_no_path_of_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, {"data": "digits"}, tls=True, ca_file="/any/file")
    assert found["tls"] == ClientTls()


def test_a_simulated_site_takes_the_runs_ca(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"partition-id": 0, "num-partitions": 2}
    found = asked(monkeypatch, node, tls=True, ca_file="/run/ca.pem")
    assert found["tls"] == ClientTls(root_ca=Path("/run/ca.pem"))


def test_without_tls_on_either_side_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, {"data": "digits"})["tls"] is None


def test_a_site_dials_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"data": "digits", "encoder-address": "proxy.example:443", "encoder-tls-ca": "system"}
    assert asked(monkeypatch, own)["address"] == "proxy.example:443"
    assert asked(monkeypatch, {"data": "digits"})["address"] == "plant:9095"


@pytest.mark.parametrize("bad", ["proxy.example", "proxy.example:https", ":443", "::1:443"])
def test_an_address_of_its_own_is_one(bad: str) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)encoder-address: .*HOST:PORT|encoder-address: .*brackets"
    ):
        SiteSettings.from_node({"encoder-address": bad}, node_id=1)
