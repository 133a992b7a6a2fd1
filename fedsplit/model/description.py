"""`python -m fedsplit.model.description BACKBONE`: a backbone's manifest, and which block each tensor belongs to, as JSON.

A process of its own, for a service that has no need of torch: it ends, and its memory with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable
from fedsplit.model.manifest import Manifest

_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Description:
    """What a service has to know of a backbone."""

    manifest: Manifest
    blocks: dict[str, tuple[int, ...]]
    """The blocks that a stored tensor belongs to, by its stored name; those of no block are left out."""


def describe(path: Path) -> Description:
    """Ask a process of its own; it reads all weights once. Raises BackboneError."""
    command = [sys.executable, "-m", "fedsplit.model.description", str(path)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        ended = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_S, env=env, check=False
        )
        said = json.loads(ended.stdout) if ended.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as err:
        raise BackboneError(f"backbone {path} could not be described ({printable(err)})") from err
    if said is None:
        last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise BackboneError(printable(last[0] if last else f"backbone {path}", limit=2000))
    blocks = {name: tuple(numbers) for name, numbers in said["blocks"].items()}
    return Description(Manifest.model_validate(said["manifest"]), blocks)


def described(path: Path) -> Description:
    """The same in this process. Raises BackboneError."""
    from fedsplit.model.backbone import Backbone, frozen_names, frozen_paths
    from fedsplit.model.checkpoint import stored_under

    backbone = Backbone.find(str(path))
    manifest, skeleton = backbone.manifest, backbone.skeleton(1)
    names = [tensor.name for tensor in manifest.tensors]
    blocks: dict[str, tuple[int, ...]] = {}
    for block in range(backbone.blocks):
        paths = frozen_paths(backbone.family, [block], embeddings=False, pool=False)
        for name in stored_under(names, skeleton, frozen_names(skeleton, paths)):
            blocks[name] = (*blocks.get(name, ()), block)
    return Description(manifest, blocks)


def main() -> int:
    """Print the description; an error in one line on stderr."""
    try:
        found = described(Path(sys.argv[1]))
    except BackboneError as err:
        sys.stderr.write(f"{printable(err, limit=2000)}\n")
        return 1
    said = {"manifest": found.manifest.model_dump(mode="json"), "blocks": found.blocks}
    sys.stdout.write(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
