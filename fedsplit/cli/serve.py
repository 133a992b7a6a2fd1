"""`fedsplit serve`: a trained module as an HTTP service on this machine. The work is `fedsplit.predict.serve`'s."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsplit.cli.console import Output
from fedsplit.cli.predict import BackboneOption, ModuleOption, PixelMaxOption, RegistryOption
from fedsplit.cli.run import JsonFlag
from fedsplit.core.errors import ConfigError, ServiceError
from fedsplit.core.throttle import Throttle, ThrottledWarnings

_LOOK_S = 0.5


def serve(
    *,
    module: ModuleOption,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="P", help="Where to listen; 0: any free one.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Beyond loopback TLS and a token are wanted.")
    ] = "127.0.0.1",
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="The service's certificate.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Who asks must show the token in it.")
    ] = None,
    backbone: BackboneOption = "",
    pixel_max: PixelMaxOption = 0.0,
    threads: Annotated[
        int, typer.Option(min=0, metavar="N", help="CPU threads to compute with; 0: all.")
    ] = 0,
    registry: RegistryOption = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1024, metavar="N", help="Samples computed at once.")
    ] = 16,
    window_ms: Annotated[
        float,
        typer.Option(
            min=0, max=1000, metavar="MS", help="How long a batch waits for requests on their way."
        ),
    ] = 5.0,
    queue: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Samples that may wait.")
    ] = 256,
    access_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where a line of JSON a call goes; else to stderr."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer predictions over HTTP until Ctrl-C or SIGTERM: POST /v1/predict with an image or {"text": ...}."""
    from fedsplit.core.cpus import wait_asleep

    wait_asleep()
    out = Output(as_json=as_json)
    from fedsplit.predict.serve.listening import Listening
    from fedsplit.predict.serve.running import Serving

    at = Listening(host=host, port=port, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    # Before the model is loaded, which takes a while.
    at.checked()
    at.bound().close()
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(ThrottledWarnings(Throttle()))
    from fedsplit.plant.supervisor import stop_on_signals
    from fedsplit.predict.found import FoundModule, find_module
    from fedsplit.predict.predictor import Predictor, load_predictor
    from fedsplit.predict.serve.answering import Answering, Limits
    from fedsplit.predict.serve.follow import Follow

    def find() -> FoundModule:
        return find_module(module, registry=registry)

    def load(found: FoundModule) -> Predictor:
        return load_predictor(found, backbone=backbone, pixel_max=pixel_max, threads=threads)

    stop = threading.Event()
    with ExitStack() as stack:
        write = stack.enter_context(_Lines(access_log))
        with out.if_long("loading the module ..."):
            predictor = load(find())
        limits = Limits(batch=max_batch, window_s=window_ms / 1000, queue=queue)
        answering = Answering(predictor, limits=limits)
        serving = stack.enter_context(Serving(answering, at, access=write))
        stack.enter_context(stop_on_signals(stop))
        _tell(out, serving.address, predictor, token=token_file is not None)
        if predictor.found.name != module:  # of a registry: its alias may move
            stack.enter_context(Follow(answering, find, load))
        while not stop.wait(_LOOK_S):
            if not serving.up:
                raise ServiceError(f"the service at {serving.address} has ended; its log says why")
        out.note(f"stopping; {answering.waiting} samples are still answered")


def _tell(out: Output, address: str, predictor: Any, *, token: bool) -> None:
    found = predictor.found
    out.result(
        {
            "address": address,
            "module": found.digest,
            "task": found.task,
            "classes": list(predictor.classes),
        }
    )
    header = " -H 'Authorization: Bearer TOKEN'" if token else ""
    what = "--data-binary @FILE" if predictor.kind == "image" else """--json '{"text": "..."}'"""
    out.note(
        f"serving {found.name} ({found.digest[:12]}) at {address}; stop with Ctrl-C\n"
        f"ask it: curl {what}{header} {address}/v1/predict"
    )


class _Lines:
    """Lines of JSON at the end of a file, or on stderr."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            self._file = self._path.open("a", encoding="utf-8") if self._path else sys.stderr
        except OSError as err:
            raise ConfigError(
                f"the access log {self._path} cannot be written ({err.strerror}); give another file"
            ) from err
        return self._write

    def __exit__(self, *_: object) -> None:
        if self._path:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except (OSError, ValueError):
            # A full disk costs lines, never answers.
            return
