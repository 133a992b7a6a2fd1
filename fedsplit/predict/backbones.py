"""Where the backbone of a module lies on this machine. Its digest decides, names are hints.

Looked into, in this order: what the caller names, the name in the module, the name in the run's config.json beside it, the
bundled ones, folders `backbones/` around the module and the working directory (a site's folder has one), the backbone of
a federation folder around the module, and FEDSPLIT_BACKBONES. Nothing is ever downloaded for a hint.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsplit.core.errors import BackboneError
from fedsplit.core.foreign import printable, read_json
from fedsplit.model.backbone import Backbone
from fedsplit.model.files import BUNDLED, CONFIG
from fedsplit.model.module import WantedBackbone, wanted_backbone
from fedsplit.model.store import BackboneStore
from fedsplit.registry.module_files import VERSION_FILE

VARIABLE = "FEDSPLIT_BACKBONES"
_STORE, _FEDERATION, _RUN_CONFIG = "backbones", "federation.toml", "config.json"
_PARENTS = 5
"""Folders above a module that are looked into: SITE/modules/DIGEST is two deep, RUNS/RUN/TASK/module four."""
_MOST = 64
"""Backbones of one folder that are looked at."""


def find_backbone_of(folder: Path, named: str = "") -> Backbone:
    """The backbone that the module in `folder` was trained on; `named` is the caller's own word for it.

    Raises BackboneError where `named` is another one, or no place has it: the message names them all.
    """
    wanted = wanted_backbone(folder)
    if named:
        found = Backbone.find(named)
        if found.sha256 != wanted.sha256:
            raise BackboneError(
                f"module {folder} was trained on {_shown(wanted)}, {named!r} has digest {found.sha256[:12]} "
                f"({found.differs(wanted.sha256)}); give the backbone of that run"
            )
        return found
    seen: list[str] = []
    for name in dict.fromkeys(_candidates(folder, wanted)):
        found_or_why = _fits(name, wanted)
        if isinstance(found_or_why, Backbone):
            return found_or_why
        seen.append(f"{printable(name, limit=200)} ({found_or_why})")
    raise BackboneError(
        f"module {folder} was trained on {_shown(wanted)}, which was not found; looked at: {'; '.join(seen)}; and for folders "
        f"{_STORE}/ around the module and here{_variable()}. Give its folder as --backbone DIR"
    )


def _shown(wanted: WantedBackbone) -> str:
    name = f"{wanted.name!r}, " if wanted.name else ""
    return f"backbone {name}digest {wanted.sha256[:12]}"


def _variable() -> str:
    return "" if os.environ.get(VARIABLE) else f", and {VARIABLE} is not set"


def _candidates(folder: Path, wanted: WantedBackbone) -> Iterator[str]:
    """Names and folders that may be it."""
    around = [folder.absolute(), *folder.absolute().parents][:_PARENTS]
    if wanted.name:
        yield wanted.name
    yield from _of_run(folder)
    yield from BUNDLED
    places = [*(place / _STORE for place in around), Path.cwd() / _STORE]
    if named := os.environ.get(VARIABLE, "").strip():
        places.append(Path(named).expanduser())
    for place in dict.fromkeys(places):
        yield from _of_store(place, wanted)
    for place in around:
        yield from _of_federation(place / _FEDERATION)


def _of_run(folder: Path) -> Iterator[str]:
    """The backbone that the run's settings name: beside a run's module, or with a registry's version."""
    for settings in (
        *_settings(folder.absolute().parent / _RUN_CONFIG),
        *_settings(folder / VERSION_FILE),
    ):
        name = settings.get("backbone")
        if isinstance(name, str) and name:
            yield name


def _settings(file: Path) -> list[dict[str, Any]]:
    """The settings of runs that a file keeps; none where it is not there, or not as it should be."""
    try:
        said = read_json(file)
        found = [said["config"]] if "config" in said else [v["settings"] for v in said["versions"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [settings for settings in found if isinstance(settings, dict)]


def _of_federation(file: Path) -> Iterator[str]:
    try:
        path = tomllib.loads(file.read_text(encoding="utf-8"))["backbone"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(path, str) and path:
        yield str(file.parent / Path(path).expanduser()) if path not in BUNDLED else path


def _of_store(place: Path, wanted: WantedBackbone) -> Iterator[str]:
    """The backbones of a folder of them: by digest, as a site keeps them, or by any name."""
    if (kept := BackboneStore(place).find(wanted.sha256)) is not None:
        yield str(kept)
        return
    try:
        inside = sorted(p for p in place.iterdir() if (p / CONFIG).is_file())
    except OSError:
        return
    yield from map(str, inside[:_MOST])


def _fits(name: str, wanted: WantedBackbone) -> Backbone | str:
    """The backbone of this name if it is the wanted one, else in words why not."""
    try:
        path = Path(name).expanduser()
        if name not in BUNDLED and not path.is_dir():
            local = _from_cache(name)
            if local is None:
                return "not here"
            path = local
        if name not in BUNDLED and wanted.model_type:
            # Before the digest, for which all weights are read.
            found = read_json(path / CONFIG).get("model_type")
            if found != wanted.model_type:
                return f"another family, {printable(found, limit=40)}"
        backbone = Backbone.find(name if name in BUNDLED else str(path))
        if backbone.sha256 == wanted.sha256:
            return backbone
        return f"digest {backbone.sha256[:12]}"
    except (BackboneError, OSError, ValueError, AttributeError, RuntimeError) as err:
        return printable(err, limit=150)


def _from_cache(name: str) -> Path | None:
    """A model of the hub that was downloaded before; None where it was not, or the name is none of a hub."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
