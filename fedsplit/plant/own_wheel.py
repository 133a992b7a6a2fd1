"""The wheel of the fedsplit that is installed here: built from the checkout that it runs from, else packed again.

An installed package has no wheel beside it any more, but all that was in it: RECORD lists the files.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedsplit.core.errors import WheelhouseError
from fedsplit.core.foreign import printable

_NOT_OF_A_WHEEL = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
_BUILD_S = 600.0


def own_wheel(folder: Path) -> Path:
    """Put the wheel into `folder`. Raises WheelhouseError where it cannot be made."""
    dist = importlib.metadata.distribution("fedsplit")
    try:
        origin = json.loads(dist.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return _built(Path(unquote(urlsplit(origin["url"]).path)), folder)
        return _packed(dist, folder)
    except (OSError, ValueError, KeyError) as err:
        raise WheelhouseError(
            f"the wheel of fedsplit itself cannot be made ({printable(err)}); install fedsplit anew and try again"
        ) from err


def _built(checkout: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(checkout)]  # fmt: skip
    if importlib.util.find_spec("hatchling") is not None:
        command.append("--no-build-isolation")
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_BUILD_S, check=False
    )
    wheels = list(folder.glob("fedsplit-*.whl"))
    if done.returncode or len(wheels) != 1:
        raise WheelhouseError(
            f"the wheel of {checkout} cannot be built: {printable(done.stderr, limit=600)}"
        )
    return wheels[0]


def _packed(dist: importlib.metadata.Distribution, folder: Path) -> Path:
    """A wheel of the files that RECORD lists, without what the installer added."""
    target = folder / f"fedsplit-{dist.version}-py3-none-any.whl"
    record = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in dist.files or []:
            of_installer = file.parts[0].endswith(".dist-info") and file.name in _NOT_OF_A_WHEEL
            if of_installer or ".." in file.parts or "__pycache__" in file.parts:
                continue
            content = Path(str(dist.locate_file(file))).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            wheel.writestr(file.as_posix(), content)
            record.append(f"{file.as_posix()},sha256={digest.decode()},{len(content)}")
        info = f"fedsplit-{dist.version}.dist-info/RECORD"
        wheel.writestr(info, "\n".join([*record, f"{info},,"]) + "\n")
    if not any(line.startswith("fedsplit/") for line in record):
        raise WheelhouseError("the installed fedsplit lists no files of its own; install it anew")
    return target
