"""Where each block of the one logical model runs: the cut (a, b)."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.core.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """`head = embeddings + blocks[0:a]`, `encoder = blocks[a:b]`, `tail = blocks[b:L] + classifier`.

    Head and tail run on the device, the encoder on the server. `(a, a)` leaves nothing on the server.
    """

    a: int
    b: int

    def __post_init__(self) -> None:
        if not 0 <= self.a <= self.b:
            raise ConfigError(f"cut {self} is not a cut: 0 <= a <= b is wanted, e.g. cut=2,10")

    def __str__(self) -> str:
        return f"{self.a},{self.b}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Read "a,b". Raises ConfigError on anything else."""
        parts = [part.strip() for part in text.split(",")]
        # Digits are counted because Python refuses to read numbers of thousands of them.
        if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
            raise ConfigError(
                f"cut {text[:100]!r} is not a cut: two block numbers are wanted, e.g. 2,10"
            )
        return cls(int(parts[0]), int(parts[1]))

    def check(self, blocks: int) -> None:
        """Raise ConfigError unless this cut fits a backbone of `blocks` blocks."""
        if self.b > blocks:
            raise ConfigError(
                f"cut {self} does not fit the backbone: it has {blocks} blocks, "
                f"so 0 <= a <= b <= {blocks} is wanted"
            )

    def local(self, blocks: int) -> bool:
        """True when nothing runs on the server (FedYolo's end of the dial)."""
        self.check(blocks)
        return self.a == self.b

    def pooled(self, blocks: int) -> bool:
        """True when the server also pools, so that d floats a sample come down, not all tokens."""
        return self.a < self.b == blocks

    def device_blocks(self, blocks: int) -> tuple[int, ...]:
        """The indices of the blocks that the device runs."""
        return (*range(self.a), *range(self.b, blocks))

    def server_blocks(self) -> tuple[int, ...]:
        """The indices of the blocks that the server runs."""
        return tuple(range(self.a, self.b))


def parse_cuts(text: str) -> tuple[Cut, ...]:
    """Read "a,b" or several, "0,12;2,10;12,12", which are dealt to the sites in turn."""
    return tuple(Cut.parse(part) for part in text.split(";") if part.strip()) or (Cut.parse(text),)
