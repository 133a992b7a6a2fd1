"""The tensors of a partial folder, read as those of a safetensors file are: each lies in a file of the store around it.

    STORE/tensors/SHA256     the bytes of one tensor and nothing else, named by their sha256
    STORE/BACKBONE/          config.json, what prepares inputs, manifest.json

store.py fills a store.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable
from fedsplit.model.manifest import StoredTensor, read_manifest

TENSORS = "tensors"
# Those that have no entry are shown as bytes and refused as such: nothing is computed with any but floats.
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_BLOCK = re.compile(r"\.(\d+)\.")


def tensor_file(store: Path, sha256: str) -> Path:
    """Where a store keeps the tensor with this digest."""
    return store / TENSORS / sha256


def is_stored(store: Path, tensor: StoredTensor) -> bool:
    """Is the tensor in this store, all of it? Its bytes are compared when it is read."""
    try:
        return tensor_file(store, tensor.sha256).stat().st_size == tensor.bytes
    except OSError:
        return False


def places(names: Iterable[str]) -> str:
    """In words where the tensors of these names are, e.g. "blocks 2 to 9"."""
    found = {int(m[1]) if (m := _BLOCK.search(name)) else None for name in names}
    blocks = sorted(block for block in found if block is not None)
    said = []
    if len(blocks) > 2 and len(blocks) == blocks[-1] - blocks[0] + 1:
        said.append(f"blocks {blocks[0]} to {blocks[-1]}")
    elif blocks:
        said.append(f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}")
    if None in found:
        said.append("embeddings or what follows the blocks")
    return " and ".join(said)


class PartialWeights:
    """A partial folder's tensors by their stored names."""

    def __init__(self, path: Path) -> None:
        """Read its manifest. Raises BackboneError."""
        self._path = path
        self._stored = {tensor.name: tensor for tensor in read_manifest(path).tensors}

    def keys(self) -> Iterable[str]:
        """All tensors of the backbone, also those that are not here."""
        return self._stored.keys()

    def check(self, keys: Iterable[str]) -> None:
        """Raise BackboneError unless all of these are here."""
        store = self._path.parent
        lacking = [t for key in keys if not is_stored(store, t := self._stored[key])]
        if lacking:
            size = sum(tensor.bytes for tensor in lacking)
            raise BackboneError(
                f"backbone {self._path}: {places(t.name for t in lacking)} ({len(lacking)} tensors, "
                f"{size / 1e6:.1f} MB) are not on this machine, and this cut needs them here; run fedsplit site fetch "
                f"with this cut, or choose another cut"
            )

    def get_tensor(self, key: str) -> Tensor:
        """A view of the tensor's file, after a look at its digest: disks of small machines lose bits."""
        tensor = self._stored[key]
        dtype = _DTYPES.get(tensor.dtype, torch.uint8)
        if not tensor.bytes:
            return torch.empty(tensor.shape, dtype=dtype)
        file = tensor_file(self._path.parent, tensor.sha256)
        size = tensor.bytes // dtype.itemsize
        try:
            flat = torch.from_file(str(file), shared=False, size=size, dtype=dtype)
        except (RuntimeError, OSError) as err:
            raise BackboneError(
                f"backbone {self._path}: {file} cannot be read ({printable(err)}); run fedsplit site fetch"
            ) from err
        if hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() != tensor.sha256:
            raise BackboneError(
                f"backbone {self._path}: {file} ({printable(key)}) has changed since it came; run fedsplit site "
                f"fetch, which brings it again, and look after the disk"
            )
        return flat.view(tensor.shape)
