"""Finds a backbone's files, digests them, and reads single tensors by the whole model's names.

Names on disk may be older than the names in memory: transformers' own renaming rules map them. Only the
tensors that are asked for are read, so a device never touches the blocks that the server runs.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BUNDLED = ("vit-glyphs",)
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def find_backbone(name: str) -> Path:
    """The directory of a backbone: a bundled name, a local directory or a hub id. Raises BackboneError."""
    if name in BUNDLED:
        return _bundled(name)
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError) as err:
        raise BackboneError(
            f"backbone {name[:200]!r} cannot be looked up ({str(err)[:100]}); give a directory"
        ) from err
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise BackboneError(
            f"backbone {name!r} is not a directory here; give a directory in Hugging Face format, a hub "
            f"id like owner/name, or the bundled {BUNDLED[0]!r}"
        )
    return _from_hub(name)


def _bundled(name: str) -> Path:
    # The Flower bundle carries only .py files, and in an app process it shadows the installed package:
    # so the weights are looked for on the whole path, not beside this file.
    for root in (Path(__file__).parents[2], *map(Path, sys.path)):
        path = root / "fedsplit" / "assets" / name
        if (path / SINGLE).is_file():
            return path.resolve()
    raise BackboneError(
        f"the bundled backbone {name!r} is not in the installed fedsplit package; install fedsplit with "
        f"pip (the Flower bundle alone does not carry weights)"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        raise BackboneError(
            f"backbone {name!r} is neither a directory here nor to be had from the model hub "
            f"({type(err).__name__}); check the name and the network, or give a local directory"
        ) from err


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a backbone, in a fixed order. Raises BackboneError when there are none."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        try:
            index = read_json(path / INDEX)
            names = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
            raise BackboneError(f"backbone {path}: {INDEX} cannot be read ({err})") from err
        files = [path / Path(str(name)).name for name in names]
        if missing := [f.name for f in files if not f.is_file()]:
            raise BackboneError(f"backbone {path}: {INDEX} names {missing}, which are not there")
        return files
    raise BackboneError(
        f"backbone {path} has no weights: {SINGLE} or {INDEX} is wanted; re-save the model with "
        f"save_pretrained(..., safe_serialization=True)"
    )


@functools.lru_cache(maxsize=8)
def digest(path: Path) -> str:
    """sha256 of the configuration and the weight files: two sites with one digest run one function."""
    total = hashlib.sha256()
    for file in (path / "config.json", *weight_files(path)):
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def load_tensors(path: Path, model: nn.Module, wanted: Collection[str]) -> dict[str, Tensor]:
    """Read the tensors `wanted` (names of `model` in memory) as fp32. Raises BackboneError if one lacks."""
    wanted = set(wanted)
    found: dict[str, Tensor] = {}
    try:
        for file in weight_files(path):
            with safe_open(file, framework="pt") as handle:
                for on_disk, in_memory in _renamed(list(handle.keys()), model):
                    if in_memory in wanted:
                        # A copy: the file's memory map must not stay resident behind the model.
                        found[in_memory] = handle.get_tensor(on_disk).to(torch.float32, copy=True)
    except (SafetensorError, OSError) as err:
        raise BackboneError(
            f"backbone {path}: its weights cannot be read ({err}); copy the files again"
        ) from err
    _check(path, model, wanted, found)
    return found


def _check(path: Path, model: nn.Module, wanted: set[str], found: dict[str, Tensor]) -> None:
    if missing := sorted(wanted - found.keys()):
        raise BackboneError(
            f"backbone {path} lacks {len(missing)} tensors that its family needs, e.g. {missing[:3]}; "
            f"is it a checkpoint of this model?"
        )
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name in wanted}
    if wrong := [n for n, t in found.items() if t.shape != shapes[n]]:
        name = wrong[0]
        raise BackboneError(
            f"backbone {path}: {name} has shape {tuple(found[name].shape)}, config.json wants "
            f"{tuple(shapes[name])}; the weights belong to another model"
        )


def _renamed(keys: list[str], model: Any) -> Iterator[tuple[str, str]]:
    """(name on disk, name in memory) by transformers' rules for this model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    in_memory = model.state_dict()
    for key in keys:
        # Rules that rebuild tensors (fused weights of old exports) are left out: such a name then
        # misses in `wanted` and is reported as lacking, instead of being read wrongly.
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, in_memory)
        yield key, name
