"""What can be wrong with a run before it starts, beyond its settings: backbone, cuts, ranks, data, how the data is dealt.

Reads files, trains nothing. A grid repeats itself, so what was looked at once is remembered. The
faults of all cells are told at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fedsplit.core.config import RunConfig
from fedsplit.core.errors import BackboneError, ConfigError, DataError
from fedsplit.experiment.cells import Cell, Faults, faults_of
from fedsplit.model import module
from fedsplit.model.backbone import Backbone
from fedsplit.model.module import ModuleSpec
from fedsplit.model.probe import check_backbone
from fedsplit.training.closed_form_start import check_start
from fedsplit.training.data import Examples, load_source, partition

_Source = tuple[str, tuple[str, ...] | None, int, str, str, float, bool]


@dataclass(frozen=True)
class Dealt:
    """How many samples of each class each site has."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """[site][class]"""


def check_cells(cells: list[Cell], faults: Faults) -> None:
    """Add every fault of the cells to `faults`."""
    for cell in cells:
        place = ", ".join(filter(None, (cell.problem, cell.column)))
        for fault in fits(cell.config):
            faults.add(cell.method, place, fault)


def fits(config: RunConfig) -> list[str]:
    """What keeps a run with these settings from working; empty when nothing is seen."""
    if not config.server.sites:
        return ["sites=0: a grid simulates its sites; set sites in [defaults] or [axes]"]
    if config.task.tasks or config.task.task_holders:
        return [
            "tasks and task-holders: a run of a grid has one task; use [[problems]] or fedsplit run"
        ]
    if config.task.target == "number":
        return [
            "target=number: a grid compares methods by their accuracy; use fedsplit run for a run on numbers"
        ]
    try:
        config = config.fitted(Backbone.find(config.placement.backbone).blocks)
    except BackboneError:
        pass  # told by _model_faults
    except ConfigError as err:
        return faults_of(err)
    # Neither decides whether a model fits, so seeds and partitions share one look.
    shape = config.changed(seed=0, run_name="", runs_dir="", partition="iid", sites=1)
    return [*_model_faults(shape), *_data_faults(config)]


@functools.lru_cache(maxsize=1024)
def _model_faults(config: RunConfig) -> tuple[str, ...]:
    try:
        backbone = Backbone.find(config.placement.backbone)
        spec = ModuleSpec.of(config.module, config.task.class_names or config.task.stand_in)
        faults = module.spec_faults(backbone, spec)
    except (BackboneError, ConfigError) as err:
        return tuple(faults_of(err))
    try:
        check_backbone(backbone, image_size=config.task.image_size)
        check_start(config, backbone)
    except (BackboneError, ConfigError) as err:
        faults += faults_of(err)
    try:
        config.check_blocks(backbone.blocks)
    except ConfigError as err:
        faults += faults_of(err)
    try:
        examples = _examples(*_source(config))
    except (DataError, ConfigError):
        examples = None  # told by _data_faults
    if examples is not None and examples.kind != backbone.family.kind:
        faults.append(
            f"data={config.task.data} holds {examples.kind}s, backbone={config.placement.backbone} reads "
            f"{backbone.family.kind}s; change data or backbone"
        )
    return tuple(faults)


def _data_faults(config: RunConfig) -> list[str]:
    try:
        classes = dealt(config).classes
    except (ConfigError, DataError) as err:
        return faults_of(err)
    if len(classes) < 2:
        return [one_class(config, classes[0])]
    return []


def one_class(config: RunConfig, name: str) -> str:
    """That there is nothing to tell apart."""
    return f"data={config.task.data} has one class, {name!r}; two or more are wanted: one folder a class, or one label a class"


def dealt(config: RunConfig) -> Dealt:
    """How the run's data falls to its sites. Raises ConfigError and DataError where it cannot be dealt."""
    counts_or_error = _dealt(
        _source(config), config.task.partition, config.server.sites, config.run.seed
    )
    if isinstance(counts_or_error, Exception):
        raise counts_or_error
    return counts_or_error


@functools.lru_cache(maxsize=1024)
def _dealt(source: _Source, spec: str, sites: int, seed: int) -> Dealt | ConfigError | DataError:
    # Errors are returned: a cache forgets those that are raised, and a grid would meet each again and again.
    try:
        examples = _examples(*source)
        parts = partition(examples.labels, spec, sites, seed, examples.groups)
    except (ConfigError, DataError) as err:
        return err
    width = len(examples.classes)
    counts = tuple(
        tuple(int(n) for n in np.bincount(examples.labels[part], minlength=width)) for part in parts
    )
    return Dealt(examples.classes, counts)


def _source(config: RunConfig) -> _Source:
    return (
        config.task.data, config.task.class_names, config.task.max_samples, config.task.text_column, config.task.label_column,
        config.task.pixel_max, config.task.broken_files == "leave-out",
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _examples(
    data: str,
    classes: tuple[str, ...] | None,
    max_samples: int,
    text: str,
    label: str,
    pixel_max: float,
    leave_out_broken: bool,
) -> Examples:
    return load_source(
        data, site="every site", classes=classes, max_samples=max_samples, text_column=text,
        label_column=label, pixel_max=pixel_max, leave_out_broken=leave_out_broken,
    )  # fmt: skip
