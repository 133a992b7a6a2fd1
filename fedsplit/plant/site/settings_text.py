"""The text of a site.toml: written once by `site join`, with a comment for each key; changed by people from then on.

A later join changes what the server decides (name, address, backbone) and leaves every other line as it is.
"""

from __future__ import annotations

import json
import re
import tomllib

from fedsplit.core.errors import ConfigError
from fedsplit.plant.settings_file import FORMAT
from fedsplit.plant.site.folder import SiteFile

_TEXT = """\
# What this site is. docs/reference/site-folder.md describes every key.
# A change counts from the next start of `fedsplit site run`.
format = {format}

[site]
# Given by the server. `fedsplit site join` with a new code changes it.
name = {name}
address = {address}
backbone-sha256 = {backbone_sha256}
# The task that the data is for, and where it is: folder:PATH, csv:PATH, jsonl:PATH or npz:PATH.
task = {task}
data = {data}
# Which blocks run here: "a,b" leaves blocks a to b-1 to the server. Empty: as the run says.
cut = {cut}

[reading]
# The columns of a table; empty: "text" and "label".
text-column = {text_column}
label-column = {label_column}
# The only names of classes that may leave this site, with commas between; empty: those of its labels.
classes = {classes}
# The pixel value that is white; 0: found from the images.
pixel-max = {pixel_max}

[machine]
# Threads for computing; 0: all.
threads = {threads}
# Megabytes that may be kept between rounds; 0: by what is free at the start.
memory-mb = {memory_mb}

[retention]
# Runs whose records and state are kept; the oldest go first.
runs = {runs}
# Megabytes of logs of each process.
log-mb = {log_mb}
# Versions of the module in modules/, the one in use among them. A rollback to one of them needs no line.
modules = {modules}

[serve]
# Answers predictions of the promoted module over HTTP; 0: no. docs/how-to/serve.md says more.
port = {port}
# Beyond 127.0.0.1 a certificate, its key and a file with a token are wanted.
host = {host}
tls-cert = {tls_cert}
tls-key = {tls_key}
token-file = {token_file}
"""


def written(settings: SiteFile) -> str:
    """A new site.toml."""
    values = {
        **settings.site.model_dump(),
        **settings.reading.model_dump(),
        **settings.machine.model_dump(),
        **settings.retention.model_dump(),
        **settings.serve.model_dump(),
    }
    return _TEXT.format(format=FORMAT, **{key: toml_value(value) for key, value in values.items()})


def changed(text: str, values: dict[str, str]) -> str:
    """The text with other values of [site]'s keys. Raises ConfigError where it is written in a way that this cannot change."""
    before = tomllib.loads(text)
    head, mark, rest = text.partition("[site]")
    table, bracket, after = rest.partition("\n[")
    for key, value in values.items():
        line = re.compile(rf"^{re.escape(key)}[ \t]*=.*$", re.MULTILINE)
        wanted = f"{key} = {toml_value(value)}"
        if line.search(table):
            table = line.sub(lambda _match, wanted=wanted: wanted, table, count=1)  # type: ignore[misc]
        else:
            table = f"\n{wanted}{table}"
    found = head + mark + table + bracket + after
    try:
        as_wanted = tomllib.loads(found) == before | {"site": before["site"] | values}
    except (tomllib.TOMLDecodeError, KeyError):
        as_wanted = False
    if not as_wanted:
        lines = "\n".join(f"    {key} = {toml_value(value)}" for key, value in values.items())
        raise ConfigError(
            f"site.toml is not written as `site join` writes it, so it cannot be changed here; write below [site]:\n{lines}\n"
            f"and join again"
        )
    return found


def toml_value(value: str | int | float) -> str:
    """A value as TOML spells it. JSON's strings are TOML's, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
