"""What a site's process loads before its first order: code, the backbone's part, the data, and one sample through the head.

Settings that only a run knows are taken at their defaults; where a run has others, its first order reads again what they
change. Nothing here may keep a site from starting.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import FedsplitError
from fedsplit.core.foreign import printable
from fedsplit.core.versions import installed
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.threads import limit_threads
from fedsplit.site.kept import MB, Kept
from fedsplit.training.data import Examples
from fedsplit.training.site_settings import SiteSettings

_CODE = ("transformers", "peft")
_CLASSES = ("one", "other")


def warm(
    kept: Kept, site: SiteSettings, find: Callable[[], Backbone] | None, *, log: logging.Logger
) -> None:
    """See SiteRuntime.warm. `find` raises BackboneError where the backbone is not to be had; None: nobody knows which."""
    limit_threads(site.threads)
    kept.limit(site.memory_mb * MB)
    log.info("site %s may keep %d MB between orders", site.name, kept.memory_bytes // MB)
    with _told("the code", log):
        for name in _CODE:
            importlib.import_module(name)
        # What is installed now is what this process runs, whatever is installed later.
        installed()
    backbone = None
    if find is not None:
        with _told("the backbone", log):
            backbone = find()
            _load(kept, site, backbone, log)
    if not (site.data or any(source for _, source in site.tasks)):
        return
    for task in [name for name, _ in site.tasks] or [""]:
        with _told(f"the data of task {printable(task)}" if task else "the data", log):
            config = _config(site, task)
            own = site.for_task(config)
            if own is None or own.data is None:
                continue
            examples = kept.sources.look(config, own)
            if backbone is not None:
                _try(kept, config, backbone, examples, site)


def _config(site: SiteSettings, task: str) -> RunConfig:
    """A run's settings, all at their defaults but for what the site knows."""
    return RunConfig.from_flat(
        {"text-column": site.text_column, "label-column": site.label_column}
        | ({"task": task} if task else {})
    )


def _load(kept: Kept, site: SiteSettings, backbone: Backbone, log: logging.Logger) -> None:
    """Read the part's tensors; the module on it is the run's, and so is the cut where the site has none."""
    if site.cut is None:
        log.info(
            "site %s has no cut of its own: the first order says which part of backbone %s is loaded",
            site.name, backbone.sha256[:12],
        )  # fmt: skip
        return
    with kept.parts.borrowed(backbone, site.cut, _module(site)):
        pass


def _module(site: SiteSettings) -> ModuleSpec:
    config = RunConfig.from_flat({})
    return ModuleSpec.of(config.module, _CLASSES, rank=site.lora_rank or None)


def _try(
    kept: Kept, config: RunConfig, backbone: Backbone, examples: Examples, site: SiteSettings
) -> None:
    """One sample through what prepares it, and through the head."""
    batch = kept.sources.transform(config, backbone).inner.collate(examples, [0])
    if site.cut is not None:
        with torch.no_grad(), kept.parts.borrowed(backbone, site.cut, _module(site)) as part:
            h_BTD = part.ends.embed(batch.inputs)
            part.trunk.run(h_BTD, part.ends.mask(batch.mask), 0, site.cut.a)


@contextmanager
def _told(what: str, log: logging.Logger) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except FedsplitError as err:
        log.warning("%s cannot be loaded before the first order: %s", what, err)
    except (
        Exception
    ):  # no fault of these may keep the site away: the order that needs it meets it again
        log.exception("%s cannot be loaded before the first order", what)
    else:
        log.info("%s: loaded in %.1f s", what, time.monotonic() - began)
