"""A real SuperLink with TLS and node keys, and sites that are a SuperNode and a resident runtime each, on loopback."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsplit.core.processes import ProcessTree
from fedsplit.core.programs import flower_environment, free_port
from fedsplit.federation.control import FlowerControl
from fedsplit.plant import pki
from tests.system.flower import BIN, CONNECTION, toml_value, wait_until


@dataclass
class ResidentSite:
    """One site's two processes and their files."""

    home: Path
    superlink: str
    supernode_port: int
    env: dict[str, str]
    tree: ProcessTree
    files: contextlib.ExitStack
    runtime: subprocess.Popen[bytes] | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_supernode(self, config: Mapping[str, Any]) -> None:
        words = " ".join(f"{k}={toml_value(v)}" for k, v in config.items())
        self._start(
            "supernode", str(BIN / "flower-supernode"), "--superlink", self.superlink,
            "--root-certificates", str(self.home.parent / "ca.pem"),
            "--auth-supernode-private-key", str(self.home / "node-key"), "--isolation", "process",
            "--superexec-auth-secret-file", str(self.home / "secret"),
            "--port", str(self.supernode_port), "--node-config", words,
        )  # fmt: skip

    def start_runtime(self) -> None:
        self.runtime = self._start(
            "runtime", str(BIN / "fedsplit"), "site", "executor",
            "--supernode", f"127.0.0.1:{self.supernode_port}", "--secret-file", str(self.home / "secret"),
            "--superlink", self.superlink, "--node-key", str(self.home / "node-key"),
            "--ca", str(self.home.parent / "ca.pem"), "--state-dir", str(self.home / "run"),
        )  # fmt: skip

    @property
    def told(self) -> dict[str, Any]:
        """What the runtime says that it does."""
        path = self.home / "run" / "runtime.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def wait_for(self, timeout_s: float = 60.0, **wanted: Any) -> None:
        wait_until(lambda: all(self.told.get(k) == v for k, v in wanted.items()), timeout_s)

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        log = self.files.enter_context((self.home / f"{name}.log").open("ab"))
        process = subprocess.Popen(
            command, env=self.env, stdout=log, stderr=log, cwd=self.home, start_new_session=True
        )
        self.tree.adopt(process.pid)
        self.processes.append(process)
        return process


@contextlib.contextmanager
def resident_deployment(
    home: Path, nodes: list[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, str], list[ResidentSite]]]:
    """The environment for `flwr`, and the sites, in the order of their node configs."""
    home.mkdir(parents=True)
    ca = pki.make_ca("test", days=1)
    key = pki.new_key()
    (home / "ca.pem").write_bytes(ca.pem)
    (home / "key.pem").write_bytes(pki.key_pem(key))
    cert = pki.issue(
        ca, key.public_key(), common_name="localhost", hosts=["127.0.0.1"], days=1, client=False
    )
    (home / "cert.pem").write_bytes(cert)
    env = flower_environment(home)
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{home / "ca.pem"}"\n'
    )
    tree = ProcessTree()
    with contextlib.ExitStack() as files:
        log = files.enter_context((home / "superlink.log").open("wb"))
        link = subprocess.Popen(
            [
                str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
                "--ssl-ca-certfile", str(home / "ca.pem"), "--ssl-certfile", str(home / "cert.pem"),
                "--ssl-keyfile", str(home / "key.pem"), "--disable-runtime-dependency-installation",
            ],
            env=env, stdout=log, stderr=log, cwd=home, start_new_session=True,
        )  # fmt: skip
        tree.adopt(link.pid)
        sites: list[ResidentSite] = []
        try:
            with FlowerControl(f"127.0.0.1:{port}", home / "ca.pem") as control:
                wait_until(lambda: _answers(control))
                for number, node in enumerate(nodes):
                    site = ResidentSite(
                        home / f"site-{number}", f"127.0.0.1:{port}", free_port(), env, tree, files
                    )
                    site.home.mkdir()
                    private, public = pki.new_node_key()
                    (site.home / "node-key").write_bytes(private)
                    (site.home / "secret").write_bytes(b"secret of site %d" % number)
                    control.register(public)
                    site.start_supernode({"state-dir": str(home / "sites"), **node})
                    site.start_runtime()
                    sites.append(site)
            yield env, sites
        finally:
            tree.end()
            for process in [link, *(p for site in sites for p in site.processes)]:
                process.wait(timeout=20)


def _answers(control: FlowerControl) -> bool:
    from fedsplit.core.errors import FederationError

    try:
        control.nodes()
    except FederationError:
        return False
    return True
