"""Where a backbone's files lie, and which of them count. Knows nothing of what is in them, and needs no torch.

A folder is whole (safetensors files) or partial: a manifest in their place, whose tensors lie in the store around it
(store.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import read_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"
BUNDLED = ("vit-glyphs",)
# What transformers' image processors and tokenizers read. Other files of a folder are nobody's business: they do not travel.
_INPUT_FILES = frozenset({
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt",
    "emoji.json", "entity_vocab.json", "normalizer.json", "byte_maps.json", "word_shape.json",
    "word_pronunciation.json", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model",
    "tokenizer.model",
})  # fmt: skip
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_LFS_POINTER = b"version https://git-lfs"
_MAX_POINTER_BYTES = 1024

Stamp = tuple[tuple[str, int, int, int, int], ...]
"""(name, bytes, time of the last change, time of the last change of its entry, inode) of each file."""


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


def refuse_pointers(path: Path) -> None:
    """Raise BackboneError for a file that git left as a pointer to the real one."""
    for file in sorted(f for pattern in _HUB_FILES for f in path.glob(pattern)):
        try:
            if file.stat().st_size > _MAX_POINTER_BYTES:
                continue
            with file.open("rb") as handle:
                start = handle.read(len(_LFS_POINTER))
        except OSError:
            continue  # who needs the file says it better
        if start == _LFS_POINTER:
            raise BackboneError(
                f"backbone {path}: {file.name} is a git-lfs pointer, not the file itself; run git lfs pull in the "
                f"repository that it came from, and copy the folder again"
            )


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


def is_partial(path: Path) -> bool:
    """Is this a backbone's folder with a manifest in place of weight files?"""
    whole = (path / SINGLE).is_file() or (path / INDEX).is_file()
    return not whole and (path / MANIFEST).is_file()


def is_small_file(name: str) -> bool:
    """May a file of this name stand in a manifest: config.json, or one that prepares inputs?"""
    return name == CONFIG or name in _INPUT_FILES


def small_files(path: Path) -> list[Path]:
    """config.json and the files that prepare inputs, as far as they are here, by name."""
    return sorted(f for name in (CONFIG, *_INPUT_FILES) if (f := path / name).is_file())


def stamp(path: Path) -> Stamp:
    """What changes when a file that counts does: for keys of whatever is kept of a backbone. Raises BackboneError."""
    weights = [path / MANIFEST] if is_partial(path) else weight_files(path)
    index = [path / INDEX] if (path / INDEX).is_file() else []
    try:
        stats = [(f.name, f.stat()) for f in (*small_files(path), *index, *weights)]
    except OSError as err:
        raise BackboneError(
            f"backbone {path}: {err}; somebody changes the folder just now"
        ) from err
    return tuple((n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats)
