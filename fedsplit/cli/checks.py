"""What a run on this machine needs beyond its settings, looked at before Flower starts: backbone, module, data, files, ports.

The same functions that ServerApp and sites call later, so that a fault has one wording. Reads only,
and forgets what it read. All faults are told at once. Torch is loaded here and not by `--help`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError, ConfigError, DataError, FedsplitError

Look = Callable[[], None]


def check_here(config: RunConfig, *, data: bool = True) -> list[str]:
    """What should be known before a run that may start. Raises what is wrong: the one error, or a ConfigError that lists several.

    `data`: the run's source is on this machine, and not at its sites.
    """
    warnings: list[str] = []
    faults: list[FedsplitError] = []
    for look in (_backbone, _runs_dir, _encoder, _tracker):
        _try(lambda look=look: look(config), faults)  # type: ignore[misc]
    if data and not any(isinstance(fault, BackboneError) for fault in faults):
        for name in config.task.sources:
            _try(lambda name=name: warnings.extend(_task(config.of_task(name))), faults)  # type: ignore[misc]
    texts = list(dict.fromkeys(str(fault) for fault in faults))
    if len(texts) > 1:
        lines = "".join(f"\n  - {text}" for text in texts)
        raise ConfigError(f"{len(texts)} faults, and nothing was started:{lines}")
    if faults:
        raise faults[0]
    return list(dict.fromkeys([*warnings, *_registry(config)]))


def _registry(config: RunConfig) -> list[str]:
    """Is the registry of modules damaged? The run goes on without it, so that is no fault."""
    from fedsplit.registry.places import is_registry

    place = config.run.registry_folder
    if place is None or not is_registry(place):
        return []
    from fedsplit.registry.registry import ModuleRegistry

    try:
        with ModuleRegistry.open(place) as kept:
            kept.aliases()
    except FedsplitError as err:
        return [f"the run will not keep its module as a version: {err}"]
    return []


def _try(look: Look, faults: list[FedsplitError]) -> None:
    try:
        look()
    except FedsplitError as err:
        faults.append(err)


def _backbone(config: RunConfig) -> None:
    from fedsplit.federation.server.start_module import StartModule
    from fedsplit.model import module
    from fedsplit.model.backbone import Backbone
    from fedsplit.model.module import ModuleSpec
    from fedsplit.model.probe import check_backbone
    from fedsplit.training.closed_form_start import check_start

    backbone = Backbone.find(config.placement.backbone)
    config = config.fitted(backbone.blocks, sites=config.server.sites)
    config.check_blocks(backbone.blocks)
    check_backbone(backbone, image_size=config.task.image_size)
    check_start(config, backbone)
    spec = ModuleSpec.of(config.module, config.task.class_names or config.task.stand_in)
    if faults := module.spec_faults(backbone, spec):
        raise ConfigError("\n  - ".join(faults))
    if config.run.start_module:
        StartModule.read(config, backbone)


def _tracker(config: RunConfig) -> None:
    from fedsplit.federation.server.books.tracker import check_tracker

    check_tracker(config)


def _task(config: RunConfig) -> tuple[str, ...]:
    """Read, deal and split one task's data as its first site will. Gives what is odd about images and backbone."""
    from fedsplit.experiment.check import one_class
    from fedsplit.model.backbone import Backbone
    from fedsplit.training.familiar import unfamiliar
    from fedsplit.training.site_data import EVERY_SITE, SiteSources
    from fedsplit.training.site_settings import SiteSettings

    number = min(config.task.holders.get(config.task.name, {0}))
    node = {"partition-id": number, "num-partitions": config.server.sites}
    site = SiteSettings.from_node(node, node_id=0).for_task(config)
    if site is None:
        return ()
    try:
        backbone = Backbone.find(config.placement.backbone)
        own = SiteSources().open(config, site, backbone, config.task.class_names)
        classes, odd = own.examples.classes, unfamiliar(backbone, own.examples)
    except (ConfigError, DataError) as err:
        raise of_source(err, site.name, EVERY_SITE) from err
    if len(classes) < 2 and config.task.target == "class":
        raise DataError(one_class(config, classes[0]))
    return odd


def of_source(err: FedsplitError, *sites: str) -> FedsplitError:
    """The error without the site that it names: none has met it yet, the fault is the source's."""
    text = str(err)
    for name in sites:
        text = text.removeprefix(f"site {name!r}: ")
    return type(err)(text)


def _runs_dir(config: RunConfig) -> None:
    """Can the run's folder be made? Looked at from the nearest folder that is there."""
    runs = Path(config.run.runs_dir).expanduser().absolute()
    there = next(p for p in (runs, *runs.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is not a folder"
        raise ConfigError(f"runs-dir={runs}: {there} {why}; choose a folder that can be written")


def _encoder(config: RunConfig) -> None:
    """The encoder's files, and its port or the encoder elsewhere."""
    if not any(
        (config.link.encoder_address, config.link.encoder_bind, config.link.encoder_secret_file)
    ):
        return
    from fedsplit.core.address import host_of
    from fedsplit.transport.keys import read_key
    from fedsplit.transport.wiring import read_pem

    for file in (config.link.encoder_tls_cert, config.link.encoder_tls_key):
        if file:
            read_pem(Path(file))
    if config.link.encoder_secret_file:
        read_key(Path(config.link.encoder_secret_file))
    if config.link.encoder_address and not config.link.encoder_bind:
        from fedsplit.federation.server.endpoint import external

        external(config)
    elif config.link.encoder_bind:
        _port(config.link.encoder_bind, host_of(config.link.encoder_bind))


def _port(bind: str, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(bind.rpartition(":")[2])))
        except OSError as err:
            raise ConfigError(
                f"encoder-bind={bind} cannot be listened on: {err.strerror or err}; stop what listens there "
                f"(`ss -ltnp`), or choose another port, e.g. 127.0.0.1:0 for any free one"
            ) from err
