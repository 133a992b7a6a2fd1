"""What `site run` keeps up: a SuperNode, and the resident runtime that takes its tasks.

The SuperNode gets its node config as a file: paths with blanks, quotes and letters of any script arrive as they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedsplit.core.programs import flower_environment, free_port, program
from fedsplit.core.whole_files import write_whole
from fedsplit.plant.service import Service
from fedsplit.plant.site.folder import SiteFolder
from fedsplit.plant.site.settings_text import toml_value
from fedsplit.training.site_settings import NodeConfig, SiteSettings

SUPERNODE, RUNTIME = "supernode", "runtime"


def node_config(folder: SiteFolder) -> dict[str, str | int | float]:
    """The SuperNode's node config. Raises ConfigError for settings that a run would refuse."""
    settings = folder.settings
    site, reading = settings.site, settings.reading
    # A source with a semicolon cannot stand in the list of tasks; then all of the site's tasks read it.
    listed = ";" not in site.data
    found: dict[str, str | int | float] = {
        "site": site.name,
        "tasks": f"{site.task}={site.data}" if listed else site.task,
        "data": "" if listed else site.data,
        "cut": site.cut,
        "encoder-address": site.address,
        "encoder-tls-ca": str(folder.ca),
        "encoder-tls-cert": str(folder.certificate),
        "encoder-tls-key": str(folder.certificate_key),
        "state-dir": str(folder.kept),
        "backbone-dir": str(folder.backbones),
        "threads": settings.machine.threads,
        "memory-mb": settings.machine.memory_mb,
        "text-column": reading.text_column,
        "label-column": reading.label_column,
        "classes": reading.classes,
        "pixel-max": reading.pixel_max,
    }
    # What is empty or 0 is the run's to say.
    found = {key: value for key, value in found.items() if value}
    as_node: NodeConfig = found
    SiteSettings.from_node(as_node, node_id=0)
    return found


def services(folder: SiteFolder) -> list[Service]:
    """The site's services; writes the node config. Raises ConfigError, FederationError, OSError."""
    node = folder.present / "node.toml"
    lines = (f"{key} = {toml_value(value)}\n" for key, value in node_config(folder).items())
    write_whole(node, "".join(lines), mode=0o600)
    env = flower_environment(folder.kept / "flower")
    port = free_port()
    supernode = Service(
        SUPERNODE,
        [
            program("flower-supernode", env),
            *("--superlink", folder.settings.site.address),
            *("--root-certificates", str(folder.ca)),
            *("--auth-supernode-private-key", str(folder.node_key)),
            *(
                "--isolation",
                "process",
                "--superexec-auth-secret-file",
                str(folder.superexec_secret),
            ),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", str(node)),
        ],
        _log(folder, SUPERNODE),
        env=env,
        port=port,
        cwd=folder.path,
    )
    if folder.settings.serve.port:
        # Two computations share the cores: who waits must not spin on one (core/cpus.py: wait_asleep).
        env = {"OMP_WAIT_POLICY": "passive", **env}
    runtime = Service(
        RUNTIME,
        [sys.executable, "-m", "fedsplit.plant.site.runtime", str(folder.path)],
        _log(folder, RUNTIME),
        env=env,
        cwd=folder.path,
    )
    return [supernode, runtime]


def _log(folder: SiteFolder, name: str) -> Path:
    return folder.logs / f"{name}.jsonl"
