"""`python -m fedsplit.plant.site.expected SITE DIGEST`: has a module answer the site's test samples, and keeps the sums.

What a module answers later is compared with these (plant/server/usage.py). A process of its own, of the lowest priority: it
loads a model for as long as it takes, and a site that lacks the memory loses this comparison alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, DataError, FedsplitError
from fedsplit.core.whole_files import write_whole
from fedsplit.model.module import wanted_backbone
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.inference import granted, held
from fedsplit.plant.site.modules import expected_file
from fedsplit.plant.site.services import node_config
from fedsplit.plant.site.usage import answered
from fedsplit.plant.wire import Answered
from fedsplit.predict.predictor import Predictor, load_predictor
from fedsplit.predict.remote import RemoteMiddle
from fedsplit.predict.usage import Sums
from fedsplit.training.data.examples import Examples
from fedsplit.training.data.sides import Record
from fedsplit.training.data.split import TEST
from fedsplit.training.site_data import SiteSources
from fedsplit.training.site_settings import SiteSettings

log = logging.getLogger("fedsplit.expected")


def expected(folder: SiteFolder, digest: str) -> Answered:
    """Sums over what the module answers on the samples that test at this site. Raises FedsplitError."""
    examples = tests(folder)
    with _opened(folder, digest) as predictor:
        if predictor.spec.numbers is not None:
            raise ConfigError(
                "the module predicts numbers; what it answers is compared for classes alone"
            )
        shares = predictor.probabilities(predictor.over(examples))
    names = [predictor.classes[i] for i in shares.argmax(axis=1)]
    return answered(Sums.of(names, shares.max(axis=1).tolist()))


@contextmanager
def _opened(folder: SiteFolder, digest: str) -> Iterator[Predictor]:
    """The module on what is here of its backbone; what is not runs at the encoder, as in a run. Raises FedsplitError."""
    module, settings = folder.modules / digest, folder.settings
    sha256 = wanted_backbone(module).sha256
    here = held(folder, sha256)
    load = partial(
        load_predictor,
        module,
        backbone=str(here.path),
        pixel_max=settings.reading.pixel_max,
        threads=settings.machine.threads,
    )
    if here.cut.local(here.blocks):
        yield load()
        return
    with RemoteMiddle(lambda: granted(folder, digest, sha256, here.cut)) as middle:
        yield load(middle=middle, cut=here.cut)


def tests(folder: SiteFolder) -> Examples:
    """The site's samples that test, for good. Raises DataError where there are none as yet."""
    site = SiteSettings.from_node(node_config(folder), node_id=0)
    task = folder.settings.site.task
    reading = {"text-column": site.text_column, "label-column": site.label_column}
    config = RunConfig.from_flat({"task": task} | {k: v for k, v in reading.items() if v})
    own = site.for_task(config)
    if own is None or not own.data:
        raise ConfigError(f"the site names no source for task {task}; correct its site.toml")
    examples = SiteSources().look(config, own)
    sides = Record(folder.kept, own.name, "").sides(examples.digests())
    if not (sides == TEST).any():
        raise DataError(
            "no sample of this site tests as yet; its first run decides which ones do, and the next start looks again"
        )
    return examples.subset(np.flatnonzero(sides == TEST))


def main(argv: list[str] | None = None) -> int:
    """The process; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedsplit.plant.site.expected", description=__doc__
    )
    parser.add_argument("site", type=Path, metavar="SITE", help="a site folder")
    parser.add_argument("digest", help="of a module in its modules/")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        folder = SiteFolder.at(args.site)
        found = expected(folder, args.digest)
        text = json.dumps({"answered": found.model_dump()}, ensure_ascii=False) + "\n"
        write_whole(expected_file(folder, args.digest), text)
    except FedsplitError as err:
        log.error("what module %s answers is not compared: %s", args.digest[:12], err)
        return 1
    except OSError as err:
        log.error("the sums cannot be kept: %s", err)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
