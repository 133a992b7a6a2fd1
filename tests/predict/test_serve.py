"""A module as a service: its answers are those of the module, whatever is asked at once, swapped or stopped meanwhile."""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fedsplit.core.errors import BackboneError, FedsplitError, ServiceError
from fedsplit.plant import pki
from fedsplit.predict.found import FoundModule
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.serve import bodies
from fedsplit.predict.serve.answering import Answering, Limits
from fedsplit.predict.serve.follow import Follow
from fedsplit.predict.serve.listening import Listening
from fedsplit.predict.serve.running import Serving

from .serving import client, gated, pictures, serving, version_of


@pytest.fixture(scope="module")
def images(trained_image_module: Path) -> Predictor:
    return load_predictor(trained_image_module)


@pytest.fixture(scope="module")
def texts(trained_text_module: Path) -> Predictor:
    return load_predictor(trained_text_module)


@pytest.fixture(scope="module")
def service(images: Predictor) -> Iterator[tuple[Serving, list[dict[str, Any]]]]:
    with serving(Answering(images)) as made:
        yield made


def until(true: Any, timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# Answers.


def test_an_image_gets_the_answer_of_the_module_bit_for_bit(
    service: tuple[Serving, list[dict[str, Any]]], images: Predictor
) -> None:
    (picture,) = pictures(1)
    own = images.predict(picture)
    name, share = next(iter(own.items()))
    wanted = {"class": name, "probability": share, "module": images.found.digest}
    coded = {"image": base64.b64encode(picture).decode()}
    with client(service[0]) as http:
        for kind in ("image/png", "application/octet-stream", "application/x-www-form-urlencoded"):
            answer = http.post("/v1/predict", content=picture, headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()) == (200, wanted)
        assert http.post("/v1/predict", json=coded).json() == wanted
        assert http.post("/v1/predict", content=iter([picture])).json() == wanted  # chunked
        scored = http.post("/v1/predict?scores=true", content=picture).json()
    assert scored == wanted | {"scores": own}


def test_a_list_and_requests_at_once_get_the_same_within_the_last_digits(
    service: tuple[Serving, list[dict[str, Any]]], images: Predictor
) -> None:
    found = pictures(20)
    own = [next(iter(images.predict(picture).items())) for picture in found]
    with client(service[0]) as http, ThreadPoolExecutor(8) as pool:
        body = [{"image": base64.b64encode(picture).decode()} for picture in found]
        listed = http.post("/v1/predict", json=body).json()
        at_once = list(
            pool.map(lambda picture: http.post("/v1/predict", content=picture).json(), found)
        )
    for answers in (listed, at_once):
        assert [answer["class"] for answer in answers] == [name for name, _ in own]
        np.testing.assert_allclose(
            [a["probability"] for a in answers], [share for _, share in own], rtol=0, atol=1e-5
        )


def test_texts(texts: Predictor) -> None:
    said = ["pump leaks oil", "belts belt", "ポンプ oil"]
    with serving(Answering(texts)) as (service, lines), client(service) as http:
        own = texts.predict(said[0])
        wanted = {"class": "pump", "probability": own["pump"], "module": texts.found.digest}
        assert http.post("/v1/predict", json={"text": said[0]}).json() == wanted
        assert http.post("/v1/predict", json=said[0]).json() == wanted
        plain = {"Content-Type": "text/plain; charset=utf-8"}
        assert http.post("/v1/predict", content=said[0], headers=plain).json() == wanted
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        as_curl = json.dumps({"text": said[0]})
        assert http.post("/v1/predict", content=as_curl, headers=form).json() == wanted
        listed = http.post("/v1/predict", json=[*said[:2], {"text": said[2]}]).json()
        assert [one["class"] for one in listed] == [next(iter(texts.predict(one))) for one in said]
        empty = http.post("/v1/predict", json=["belt", "  "])
        assert (empty.status_code, empty.json()["error"]["kind"]) == (422, "data")
        assert "sample 2: the text is empty" in empty.json()["error"]["message"]
        long = http.post("/v1/predict", json={"text": "belt " * 10**6})
        assert long.status_code == 413
    assert not any("pump" in json.dumps(line, ensure_ascii=False) for line in lines)


# Modules that are swapped.


def test_modules_are_swapped_under_load_and_no_answer_is_lost_or_mixed(
    trained_image_module: Path, images: Predictor, tmp_path: Path
) -> None:
    module = trained_image_module / "module"
    versions = [images, *(version_of(module, tmp_path / f"v{i}", i) for i in range(3))]
    asked = pictures(6)
    own = {
        version.found.digest: [version.probabilities(version.outputs([version.prepare(p)]))[0] for p in asked]
        for version in versions
    }  # fmt: skip
    assert len(own) == 4
    stop = threading.Event()
    with serving(Answering(images)) as (service, _), client(service) as http:

        def ask(first: int) -> list[tuple[int, list[dict[str, Any]]]]:
            found = []
            for i in itertools.count(first):
                two = [asked[i % 6], asked[(i + 1) % 6]]
                body = [{"image": base64.b64encode(picture).decode()} for picture in two]
                answer = http.post("/v1/predict?scores=true", json=body)
                assert answer.status_code == 200, answer.text
                found.append((i % 6, answer.json()))
                if stop.is_set():
                    return found
            raise AssertionError

        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(ask, first) for first in range(6)]
            for version in itertools.islice(itertools.cycle(versions[1:] + versions[:1]), 20):
                before = service.counts.shown()["answered"]
                service.answering.swap(version)
                until(lambda before=before: service.counts.shown()["answered"] > before + 2)
            stop.set()
            found = [answer for one in running for answer in one.result()]
        counts = service.counts.shown()
    assert service.answering.swaps == 20
    assert (counts["answered"], counts["refused"]) == (len(found), 0)
    seen = set()
    for i, two in found:
        (digest,) = {one["module"] for one in two}
        seen.add(digest)
        for at, one in enumerate(two):
            wanted = own[digest][(i + at) % 6]
            np.testing.assert_allclose(list(one["scores"].values()), wanted, rtol=0, atol=1e-5)
            assert wanted[images.classes.index(one["class"])] > wanted.max() - 1e-5
    assert len(seen) == 4


def test_a_module_that_is_meant_from_now_on_is_loaded_and_what_cannot_be_is_told(
    images: Predictor, trained_image_module: Path, tmp_path: Path
) -> None:
    other = version_of(trained_image_module / "module", tmp_path / "other", 7)
    meant: list[FoundModule | None] = [None]

    def load(found: FoundModule) -> Predictor:
        if found.digest == "broken":
            raise BackboneError("it is damaged; copy it again")
        return {p.found.digest: p for p in (images, other)}[found.digest]

    answering = Answering(None)
    follow = Follow(answering, lambda: meant[0], load, every_s=0.01)
    with serving(answering, grace_s=1.0) as (service, _), client(service) as http, follow:
        waits = http.post("/v1/predict", content=b"x")
        assert (waits.status_code, waits.headers["Retry-After"]) == (503, "5")
        assert "no module is in use" in waits.json()["error"]["message"]
        assert http.get("/health").json()["status"] == "waiting"
        assert http.get("/v1/module").status_code == 503
        meant[0] = images.found
        until(lambda: answering.predictor is images)
        meant[0] = FoundModule(tmp_path, "broken", "x", "digits")
        until(lambda: follow.fault)
        assert follow.fault == "it is damaged; copy it again"
        assert http.get("/v1/module").json()["module"] == images.found.digest
        meant[0] = other.found
        until(lambda: answering.predictor is other and not follow.fault)


# Much at once.


def test_a_lone_request_does_not_wait_and_what_waits_makes_a_batch(images: Predictor) -> None:
    slow, model = gated(images)
    model.may.set()
    answering = Answering(slow, limits=Limits(batch=4, window_s=5.0))
    with serving(answering) as (service, _), client(service) as http:
        (picture, *others) = pictures(9)
        began = time.monotonic()
        http.post("/v1/predict", content=picture)
        assert time.monotonic() - began < 2.5
        model.may.clear()
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(http.post, "/v1/predict", content=picture)
            until(lambda: answering.waiting == 1 and not answering._jobs and answering.batches == 2)
            rest = [pool.submit(http.post, "/v1/predict", content=other) for other in others]
            until(lambda: len(answering._jobs) == 8)
            model.may.set()
            assert {one.result().status_code for one in (first, *rest)} == {200}
    assert model.batches == [1, 1, 1, 4, 4]  # the first is that of `swap`


def test_a_full_queue_says_when_to_ask_again(images: Predictor) -> None:
    slow, model = gated(images)
    model.may.set()
    answering = Answering(slow, limits=Limits(queue=3))
    with serving(answering) as (service, _), client(service) as http, ThreadPoolExecutor(3) as pool:
        model.may.clear()
        pending = [pool.submit(http.post, "/v1/predict", content=p) for p in pictures(3)]
        until(lambda: answering.waiting == 3)
        full = http.post("/v1/predict", content=pictures(1)[0])
        assert full.status_code == 503
        assert int(full.headers["Retry-After"]) >= 1
        assert "3 samples wait here, and 3 is the most" in full.json()["error"]["message"]
        model.may.set()
        assert {one.result().status_code for one in pending} == {200}
        assert http.post("/v1/predict", content=pictures(1)[0]).status_code == 200
        coded = {"image": base64.b64encode(pictures(1)[0]).decode()}
        assert http.post("/v1/predict", json=[coded] * 4).status_code == 503
        assert answering.waiting == 0


def test_a_stop_answers_what_was_taken(images: Predictor) -> None:
    slow, model = gated(images)
    model.may.set()
    answering = Answering(slow)
    with ThreadPoolExecutor(6) as pool, serving(answering) as (service, _), client(service) as http:
        model.may.clear()
        pending = [pool.submit(http.post, "/v1/predict", content=p) for p in pictures(5)]
        until(lambda: answering.waiting == 5)
        ending = pool.submit(service.close)
        until(lambda: service._server.should_exit)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.post(f"{service.address}/v1/predict", content=b"x", trust_env=False)
        model.may.set()
        assert [one.result().status_code for one in pending] == [200] * 5
        ending.result()
        assert not service.up
        with pytest.raises(ServiceError, match="being stopped"), answering.place():
            pass


def test_a_sample_that_cannot_be_computed_costs_no_other_its_answer(images: Predictor) -> None:
    def fails(inputs: Any, mask: Any) -> Any:
        if bool((inputs["pixel_values"].flatten(1).std(dim=1) < 1e-6).any()):
            raise RuntimeError("no memory")
        return images.model(inputs, mask)

    slow, model = gated(images)
    model._model = fails
    answering = Answering(limits=Limits(batch=8))
    answering._predictor = slow
    with serving(answering) as (service, _), client(service) as http, ThreadPoolExecutor(4) as pool:
        asked = [*pictures(3), *_of_one_colour()]
        pending = [pool.submit(http.post, "/v1/predict", content=p) for p in asked]
        until(lambda: answering.waiting == 4 and not answering._preparing)
        model.may.set()
        answers = [one.result() for one in pending]
    assert [one.status_code for one in answers] == [200, 200, 200, 500]
    assert "Traceback" not in answers[3].text


def _of_one_colour() -> list[bytes]:
    from .serving import png

    return [png(np.full((16, 16, 3), 200, np.uint8))]


# Who may ask, and where.


def test_a_token_and_tls(images: Predictor, tmp_path: Path) -> None:
    token = "s3cret-" + "x" * 30
    (tmp_path / "token").write_text(token + "\n")
    ca = pki.make_ca("line", days=2)
    key = pki.new_key()
    cert = pki.issue(ca, key.public_key(), common_name="line", hosts=("127.0.0.1",), days=2, client=False)  # fmt: skip
    for name, pem in (("cert", cert), ("key", pki.key_pem(key)), ("ca", ca.pem)):
        (tmp_path / f"{name}.pem").write_bytes(pem)
    settings = {
        "host": "0.0.0.0", "tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem",
        "token_file": tmp_path / "token",
    }  # fmt: skip
    import ssl

    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    with serving(Answering(images), **settings) as (service, lines):
        address = service.address.replace("0.0.0.0", "127.0.0.1")
        assert address.startswith("https://")
        with httpx.Client(base_url=address, verify=context, trust_env=False) as http:
            for header in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Basic {token}"},
            ):
                refused = http.post("/v1/predict", content=b"x", headers=header)
                assert refused.status_code == 401
                assert refused.headers["WWW-Authenticate"] == "Bearer"
                assert http.get("/openapi.json", headers=header).status_code == 401
            assert http.get("/health").status_code == 200
            given = {"Authorization": f"Bearer {token}", "Host": "line-3.plant"}
            answer = http.post("/v1/predict", content=pictures(1)[0], headers=given)
            assert answer.status_code == 200
    assert token not in json.dumps(lines)


def test_what_is_wrong_with_the_settings_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "weak").write_text("secret")
    with pytest.raises(FedsplitError) as caught:
        Listening(host="0.0.0.0", tls_key=tmp_path / "none", token_file=tmp_path / "weak").checked()
    told = str(caught.value)
    for part in ("go together", "is no file", "so TLS is wanted", "holds 6 bytes; 24 to 1024"):
        assert part in told
    with pytest.raises(FedsplitError, match="so a token is wanted"):
        Listening(host="192.0.2.1").checked()
    (tmp_path / "pem").write_text("x")
    with pytest.raises(FedsplitError, match="cannot be used"):
        Listening(tls_cert=tmp_path / "pem", tls_key=tmp_path / "pem").checked()
    with Listening().bound() as taken:
        taken.listen()
        with pytest.raises(ServiceError, match="choose another port"):
            Listening(port=taken.getsockname()[1]).bound()


def test_on_loopback_other_names_are_refused(service: tuple[Serving, list[dict[str, Any]]]) -> None:
    with client(service[0]) as http:
        assert http.get("/v1/module", headers={"Host": "evil.example"}).status_code == 403
        for host in ("localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert http.get("/v1/module", headers={"Host": host}).status_code == 200


# What it says of itself.


def test_health_module_metrics_and_openapi(images: Predictor) -> None:
    with serving(Answering(images)) as (service, lines), client(service) as http:
        http.post("/v1/predict", content=pictures(1)[0])
        http.post("/v1/predict", content=b"no image")
        health = http.get("/health").json()
        assert (health["status"], health["answered"], health["refused"]) == ("ok", 1, 1)
        assert health["p50_ms"] > 0
        module = http.get("/v1/module").json()
        assert (module["module"], module["task"]) == (images.found.digest, "digits")
        assert module["classes"] == list("0123456789")
        metrics = http.get("/metrics").text
        assert 'fedsplit_serve_requests_total{status="200"} 1.0' in metrics
        assert 'fedsplit_serve_requests_total{status="422"} 1.0' in metrics
        assert "fedsplit_serve_seconds_count 1.0" in metrics
        said = http.get("/openapi.json").json()
        assert set(said["paths"]) == {"/v1/predict", "/v1/module", "/health", "/metrics"}
        check_answers_against(said, http)
        nowhere = http.get("/v2")
        assert nowhere.status_code == 404
        assert "POST /v1/predict" in nowhere.json()["error"]["message"]
    kept = next(line for line in lines if line["path"] == "/v1/predict")
    assert kept == kept | {"method": "POST", "status": 200, "samples": 1, "client": "127.0.0.1"}
    assert kept["module"] == images.found.digest[:12]


def check_answers_against(said: dict[str, Any], http: httpx.Client) -> None:
    """Answers and refusals are what the OpenAPI text says they are."""
    jsonschema = pytest.importorskip("jsonschema")
    paths = said["paths"]
    asked = [
        ("post", "/v1/predict", {"content": pictures(1)[0]}),
        ("post", "/v1/predict", {"content": b"x"}),
        ("post", "/v1/predict", {"content": b"x", "headers": {"Content-Type": "video/mp4"}}),
        ("get", "/v1/module", {}),
        ("get", "/health", {}),
    ]
    for method, path, more in asked:
        answer = http.request(method, path, **more)
        told = paths[path][method]["responses"][str(answer.status_code)]
        schema = told["content"]["application/json"]["schema"] | {"components": said["components"]}
        jsonschema.validate(answer.json(), schema)


def test_metrics_without_their_package_say_what_to_install(
    service: tuple[Serving, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with client(service[0]) as http:
        answer = http.get("/metrics")
    assert answer.status_code == 501
    assert re.search(r"fedsplit\[server\].*/health", answer.json()["error"]["message"])


def test_a_body_that_is_too_slow_is_given_up(
    service: tuple[Serving, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "READ_S", 0.05)
    more = threading.Event()

    def dribble() -> Iterator[bytes]:
        yield b"a"
        more.wait(5)

    with client(service[0]) as http, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(http.post, "/v1/predict", content=dribble())
        until(lambda: any(line["status"] == 408 for line in service[1]))
        more.set()
        assert slow.result().status_code == 408
