"""Reads single tensors of a backbone by the whole model's names.

Names on disk may be older than the names in memory: transformers' own rules map them, and cut what older exports
keep in one tensor. Only the tensors that are asked for are read, so a device never touches the blocks that the
server runs; `check_tensors` looks at all of them, one at a time. They lie in safetensors files, or, of a partial folder,
each in a file of the store around it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedsplit.core.errors import BackboneError
from fedsplit.model.files import is_partial, weight_files
from fedsplit.model.partial import PartialWeights

# What of a file is a number as fp32 has them: integers and 8-bit floats mean nothing without their scales.
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor in memory lies on disk: a whole tensor of a file, or one of equal pieces of it."""

    key: str
    piece: int = 0
    pieces: int = 1
    dim: int = 0


def load_tensors(path: Path, model: nn.Module, wanted: Collection[str]) -> dict[str, Tensor]:
    """Read the tensors `wanted` (names of `model` in memory) as fp32. Raises BackboneError if one is not to be had."""
    wanted = set(wanted)
    # A copy: the file's memory map must not stay resident behind the model.
    found = {n: t.to(torch.float32, copy=True) for n, t in _tensors(path, model, wanted)}
    _check_names(path, wanted, found.keys())
    return found


def check_tensors(path: Path, model: nn.Module, wanted: Collection[str]) -> None:
    """Raise what `load_tensors` would, for all of `wanted`, holding one tensor at a time."""
    wanted = set(wanted)
    _check_names(path, wanted, {n for n, _ in _tensors(path, model, wanted)})


def stored_names(path: Path, model: nn.Module) -> set[str]:
    """The tensors of `model` that are on disk, by their names in memory."""
    rules, found = _rules(model), set[str]()
    for keys in _keys(path):
        found |= {name for key in keys for name, _ in _in_memory(key, model, rules)}
    return found & rules.in_memory.keys()


def stored_under(keys: Iterable[str], model: nn.Module, wanted: Collection[str]) -> set[str]:
    """Those of `keys`, names of stored tensors, that `load_tensors` reads for `wanted`."""
    rules = _rules(model)
    return {key for key in keys if any(n in wanted for n, _ in _in_memory(key, model, rules))}


def _keys(path: Path) -> Iterator[list[str]]:
    for opened in _opened(path):
        with opened as handle:
            yield list(handle.keys())


def _tensors(path: Path, model: nn.Module, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    shapes = {n: p.shape for n, p in model.state_dict().items() if n in wanted}
    rules = _rules(model)
    for opened in _opened(path):
        with opened as handle:
            keys = {
                key: places
                for key in handle.keys()  # noqa: SIM118
                if (places := [p for p in _in_memory(key, model, rules) if p[0] in wanted])
            }
            if isinstance(handle, PartialWeights):
                handle.check(keys)
            for key, places in keys.items():
                for name, stored in places:
                    tensor = _piece(handle.get_tensor(key), stored)
                    _check_tensor(path, name, tensor, shapes[name])
                    yield name, tensor


def _opened(path: Path) -> Iterator[AbstractContextManager[Any]]:
    """What a backbone's tensors are read from, one after the other."""
    if is_partial(path):
        yield nullcontext(PartialWeights(path))
        return
    for file in weight_files(path):
        yield _safetensors(path, file)


@contextmanager
def _safetensors(path: Path, file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as err:
        raise BackboneError(
            f"backbone {path}: its weights cannot be read ({err}); copy the files again"
        ) from err


def _piece(tensor: Tensor, stored: _Stored) -> Tensor:
    if stored.pieces == 1:
        return tensor
    pieces = torch.chunk(tensor, stored.pieces, dim=stored.dim)
    return pieces[stored.piece] if len(pieces) == stored.pieces else tensor


def _check_tensor(path: Path, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.dtype not in _FLOATS:
        raise BackboneError(
            f"backbone {path}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; float16, bfloat16, float32 or "
            f"float64 is wanted. Quantised weights cannot be trained through here: use the checkpoint that they "
            f"were made from"
        )
    if tensor.shape != shape:
        raise BackboneError(
            f"backbone {path}: {name} has shape {tuple(tensor.shape)}, config.json wants {tuple(shape)}; the "
            f"weights belong to another model"
        )
    # Both ends are NaN where a value is, and no mask as large as the tensor is made.
    if tensor.numel() and not all(end.isfinite() for end in torch.aminmax(tensor)):
        raise BackboneError(
            f"backbone {path}: {name} holds NaN or infinite values; copy the files again, or use another checkpoint"
        )


def _check_names(path: Path, wanted: set[str], found: Collection[str]) -> None:
    missing = sorted(wanted - set(found))
    if not missing:
        return
    if all(".pooler." in name for name in missing):
        raise BackboneError(
            f"backbone {path} has no pooler ({missing[0]}), which its family's classification reads; it was saved "
            f"from a model without one, such as a masked language model: use a checkpoint that has it"
        )
    raise BackboneError(
        f"backbone {path} lacks {len(missing)} tensors that its family needs, e.g. {missing[:3]}; "
        f"is it a checkpoint of this model?"
    )


@dataclass(frozen=True)
class _NameRules:
    """transformers' rules for the names of a model, and the tensors that they cut in pieces."""

    renamings: list[Any]
    cuts: list[Any]
    in_memory: dict[str, Tensor]


def _rules(model: Any) -> _NameRules:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model)
    # Other rules rebuild tensors in ways that no family here needs: such a name then misses in `wanted` and is
    # reported as lacking, instead of being read wrongly.
    return _NameRules(
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if _cuts(rule)],
        model.state_dict(),
    )


def _cuts(rule: Any) -> bool:
    from transformers.core_model_loading import Chunk, WeightConverter

    return (
        isinstance(rule, WeightConverter)
        and len(rule.source_patterns) == 1
        and len(rule.operations) == 1
        and isinstance(rule.operations[0], Chunk)
        and rule.operations[0].num_shards_attribute is None
    )


def _in_memory(key: str, model: Any, rules: _NameRules) -> Iterator[tuple[str, _Stored]]:
    """(name in memory, where it lies) of what is stored under `key`."""
    from transformers.core_model_loading import rename_source_key

    name, source = rename_source_key(
        key, rules.renamings, rules.cuts, model.base_model_prefix, rules.in_memory
    )
    cut = next((rule for rule in rules.cuts if source in rule.source_patterns), None)
    if cut is None:
        yield name, _Stored(key)
        return
    first, dim = cut.target_patterns[0], cut.operations[0].dim
    for i, target in enumerate(cut.target_patterns):
        yield name.replace(first, target), _Stored(key, i, len(cut.target_patterns), dim)
