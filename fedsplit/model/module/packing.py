"""A module version as bytes for the encoder host: written strictly, read with distrust."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsplit.core.errors import ProtocolError
from fedsplit.model.module.spec import ModuleSpec, ModuleTensors, about, read_about


def pack(spec: ModuleSpec, tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """A module version as safetensors bytes, with the spec beside the weights as metadata."""
    from safetensors.numpy import save

    return save(dict(tensors), metadata={"fedsplit": json.dumps(about(spec))})


def unpack(data: bytes) -> tuple[ModuleSpec, ModuleTensors]:
    """The inverse of `pack`. Raises ProtocolError on anything that `pack` does not write."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        spec = read_about(json.loads(header["__metadata__"]["fedsplit"]))
        tensors = load_bytes(data)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as err:
        raise ProtocolError(
            f"a module version could not be read ({type(err).__name__}: {str(err)[:200]}); it is safetensors "
            f"bytes as fedsplit packs them"
        ) from err
    if wrong := [
        n for n, t in tensors.items() if t.dtype != np.float32 or not np.isfinite(t).all()
    ]:
        raise ProtocolError(f"module tensor {wrong[0]!r} is not finite float32")
    return spec, tensors
