"""A site's own settings: what its node config says, and what of a run's settings it does not let a run decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedsplit.core.address import host_of
from fedsplit.core.config import RunConfig
from fedsplit.core.cut import Cut
from fedsplit.core.errors import ConfigError
from fedsplit.core.foreign import MAX_NAME_CHARS, printable
from fedsplit.core.tasks import parse_classes, parse_held

NodeConfig = Mapping[str, str | int | float | bool]
# What a site may say of itself; the first two are Flower's own in simulation.
NODE_KEYS = (
    "partition-id",
    "num-partitions",
    "site",
    "data",
    "text-column",
    "label-column",
    "classes",
    "pixel-max",
    "tasks",
    "cut",
    "backbone-dir",
    "encoder-address",
    "encoder-tls-ca",
    "encoder-tls-cert",
    "encoder-tls-key",
    "threads",
    "memory-mb",
    "lora-rank",
    "state-dir",
)
MAX_LORA_RANK = 1024


@dataclass(frozen=True)
class SiteSettings:
    """A site's own settings, from its node config."""

    name: str
    data: str | None
    """The site's own source; None in simulation alone: its share of the run's."""
    cut: Cut | None
    partition: tuple[int, int] | None
    """(this site's number, number of sites) of a partitioned source."""
    encoder_tls_ca: str
    threads: int
    """Threads for torch; 0: torch's own choice."""
    encoder_tls_cert: str = ""
    encoder_tls_key: str = ""
    """Certificate and key that this site shows to an encoder that asks for one."""
    lora_rank: int = 0
    """The site's own LoRA rank; 0: the run's."""
    state_dir: str = ""
    """Where the site keeps what is its own between rounds; empty: a folder in its user's home."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(task, own source or "") of the tasks that the site holds; empty: all that a run has."""
    text_column: str = "text"
    label_column: str = "label"
    """The columns of its own source that the site lets runs read."""
    classes: tuple[str, ...] = ()
    """The only names of classes that leave the site; empty: those that its labels have."""
    pixel_max: float = 0.0
    """The value that is white in the site's own images; 0: the run's, or found out from them."""
    encoder_address: str = ""
    """HOST:PORT at which this site reaches the encoder; empty: the run's."""
    backbone_dir: str = ""
    """Folder of backbones by digest, looked into before the run's own name of one; empty: none."""
    memory_mb: int = 0
    """Megabytes that the site's process may keep between orders; 0: half of what was free when it started."""

    @classmethod
    def from_node(cls, node: NodeConfig, *, node_id: int) -> SiteSettings:
        """Read a node config. Raises ConfigError with every fault."""
        faults = [
            f"unknown node-config key {key!r}; known: {', '.join(NODE_KEYS)}"
            for key in node
            if key not in NODE_KEYS
        ]
        number, of = node.get("partition-id"), node.get("num-partitions")
        share = (number, of) if isinstance(number, int) and isinstance(of, int) else None
        if share and not 0 <= share[0] < share[1]:
            faults.append(f"partition-id={number} is not in 0..{share[1] - 1}")
        if share is None and (number is not None or of is not None):
            faults.append(
                f"partition-id={number!r}, num-partitions={of!r}: partition-id and num-partitions are "
                f"whole numbers and go together"
            )
        threads = node.get("threads", 0)
        if not isinstance(threads, int) or threads < 0:
            faults.append(f"threads={threads!r} is not a number of threads")
        memory = node.get("memory-mb", 0)
        if not isinstance(memory, int) or not 0 <= memory <= 2**30:
            faults.append(f"memory-mb={memory!r} is not a number of megabytes")
        rank = node.get("lora-rank", 0)
        if not isinstance(rank, int) or not 0 <= rank <= MAX_LORA_RANK:
            faults.append(f"lora-rank={rank!r} is not a rank in 0..{MAX_LORA_RANK}")
        white = node.get("pixel-max", 0.0)
        if not isinstance(white, int | float) or not 0 <= white <= 2**32:
            faults.append(f"pixel-max={white!r} is not the value of a pixel")
        if bool(node.get("encoder-tls-cert")) != bool(node.get("encoder-tls-key")):
            faults.append("encoder-tls-cert and encoder-tls-key go together; give both or neither")
        name = str(node.get("site", f"site-{number}" if share else f"node-{node_id}"))
        if not name or printable(name, limit=MAX_NAME_CHARS) != name:
            faults.append(
                f"site={name[:50]!r}: 1 to {MAX_NAME_CHARS} printable characters are wanted"
            )
        cut = None
        try:
            cut = Cut.parse(str(node["cut"])) if "cut" in node else None
        except ConfigError as err:
            faults.append(str(err))
        address = str(node.get("encoder-address", ""))
        try:
            host_of(address or "unset:0")
        except ConfigError as err:
            faults.append(f"encoder-address: {err}")
        tasks: dict[str, str] = {}
        try:
            tasks = parse_held(str(node.get("tasks", "")))
        except ConfigError as err:
            faults.append(str(err))
        if faults:
            raise ConfigError(
                "the site's node config has faults:\n" + "\n".join(f"  - {f}" for f in faults)
            )
        return cls(
            name=name,
            data=str(node["data"]) if "data" in node else None,
            cut=cut,
            partition=share,
            encoder_tls_ca=str(node.get("encoder-tls-ca", "")),
            encoder_tls_cert=str(node.get("encoder-tls-cert", "")),
            encoder_tls_key=str(node.get("encoder-tls-key", "")),
            threads=int(threads) if isinstance(threads, int) else 0,
            lora_rank=int(rank) if isinstance(rank, int) else 0,
            state_dir=str(node.get("state-dir", "")),
            tasks=tuple(tasks.items()),
            text_column=str(node.get("text-column", cls.text_column)),
            label_column=str(node.get("label-column", cls.label_column)),
            classes=parse_classes(str(node.get("classes", ""))),
            pixel_max=float(white) if isinstance(white, int | float) else 0.0,
            encoder_address=address,
            memory_mb=int(memory) if isinstance(memory, int) else 0,
            backbone_dir=str(node.get("backbone-dir", "")),
        )

    def for_task(self, config: RunConfig) -> SiteSettings | None:
        """These settings for the run's `task`, or None where the site does not hold it.

        Raises ConfigError for what a site does not do: read what only a run names, or another column than its own
        settings say.
        """
        held = dict(self.tasks)
        if held and config.task.name not in held:
            return None
        data = held.get(config.task.name) or self.data
        if len(config.task.sources) > 1 and data and not held.get(config.task.name):
            raise ConfigError(
                f"site {self.name!r}: data={data} is one source and the run has several tasks; name the source of "
                f"each in the site's node config, e.g. tasks={config.task.name}={data}"
            )
        share = self.partition
        holders = sorted(config.task.holders.get(config.task.name, ()))
        if share is not None and holders:
            number, of = share
            if holders[-1] >= of:
                raise ConfigError(
                    f"task-holders gives {config.task.name} to site {holders[-1]}, the simulation's sites are numbered "
                    f"from 0 to {of - 1}; correct it, or simulate more sites"
                )
            if number not in holders:
                return None
            # Dealt among those that hold it: nobody gets a share that is then not used.
            share = (holders.index(number), len(holders))
        if data:
            self._check_own(config)
        elif share is None:
            example = f"tasks={config.task.name}=" if config.task.tasks else "data="
            raise ConfigError(
                f"site {self.name!r}: its node config names no data for task {config.task.name!r}, and a site reads nothing "
                f"that only a run names; put {example}folder:/PATH into its node config"
            )
        return replace(self, data=data, partition=share)

    def _check_own(self, config: RunConfig) -> None:
        """Raise ConfigError where a run wants another column, or other names of classes, than the site lets it have."""
        faults = [
            f"the run reads {key}={asked[:100]!r}, this site's node config says {key}={own!r}; start the run with "
            f"{key}={own}, or change the node config"
            for key, asked, own in (
                ("text-column", config.task.text_column, self.text_column),
                ("label-column", config.task.label_column, self.label_column),
            )
            if asked != own
        ]
        declared = config.task.class_names
        if self.classes and declared and set(declared) != set(self.classes):
            faults.append(
                f"the run declares classes={','.join(declared)[:200]}, this site's node config says "
                f"classes={','.join(self.classes)[:200]}; give both the same, or leave classes out of the run"
            )
        if self.classes and config.task.target == "number":
            faults.append(
                "the run trains on target=number, this site's node config lets only its classes leave; remove classes from the "
                "node config if numbers may be trained on"
            )
        if faults:
            raise ConfigError(f"site {self.name!r}: {'; '.join(faults)}")
