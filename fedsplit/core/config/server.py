"""The federation as the server runs it: which sites, how long it waits, and what it makes of their updates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedsplit.core.aggregation import sites_needed
from fedsplit.core.config.section import ANEW, SERVERS_OWN, Check, Section


class ServerSection(Section):
    """The federation as the server runs it."""

    sites: int = Field(default=0, ge=0)
    """Number of sites that the run waits for; 0: all that are connected."""
    roster: Annotated[str, ANEW, SERVERS_OWN] = ""
    """Comma-separated names of the sites that take part, in place of `sites`; empty: all that are connected."""
    min_sites: Annotated[int, ANEW] = Field(default=2, ge=1)
    """A round with fewer useful updates ends the run."""
    deadline_s: Annotated[float, ANEW] = Field(default=600.0, gt=0, allow_inf_nan=False)
    """How long a round waits for its sites before it continues without the missing ones."""
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the sites that train in a round, drawn again each round. All sites are tested at the end."""
    early_stop_rounds: int = Field(default=0, ge=0)
    """End after this many rounds without a better global accuracy (of numbers: MAE), and keep the best module; 0: never."""
    server_optimizer: Literal["mean", "momentum", "adam", "yogi"] = "mean"
    """What the server does with the mean update: apply it, or take a step of FedAvgM, FedAdam or FedYogi."""
    server_learning_rate: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Learning rate of the server's optimiser. Good values: 1 with mean, about 0.1 with momentum, 0.01 with adam and yogi."""
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of server-optimizer=momentum, and the first beta of adam and yogi."""
    robust_rule: Literal["mean", "trimmed-mean", "median", "krum", "multi-krum", "bulyan"] = "mean"
    """How the sites' updates are combined. All rules except mean tolerate some hostile sites."""
    byzantine_sites: int = Field(default=0, ge=0)
    """Number of hostile sites that the robust rule must tolerate."""
    max_update_ratio: float = Field(default=20.0, ge=0, allow_inf_nan=False)
    """Refuse an update that moves this many times as far as the median of the sites'; 0: refuse none. With robust-rule=mean."""
    max_site_share: float = Field(default=0.5, ge=0.5, le=1)
    """Largest share of the average for one site's samples, or three times the median's share if that is more; 1: no limit."""
    step_back: bool = True
    """Undo a round in which most sites lost more than 10 points (of numbers: 0.1 of R2), or after which most cannot train."""
    compare_local_only: bool = False
    """Also train every site alone for as many epochs, and report its accuracy."""

    @field_validator("roster")
    @classmethod
    def _check_roster(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")] if value else []
        if not all(names) or len(set(names)) != len(names):
            raise ValueError(
                f"roster {value[:100]!r} is no list of names; give each site's name once, e.g. line-a,line-b"
            )
        return value

    def contradictions(self) -> list[Check]:
        """Settings of this section that cannot go together."""
        expected, selected = self.expected_sites, self.selected(self.expected_sites)
        needed = sites_needed(self.robust_rule, self.byzantine_sites)
        sites = f"roster, which names {expected}" if self.roster_names else f"sites={expected}"
        return [
            (
                bool(self.sites) and self.sites < len(self.roster_names),
                f"roster names {len(self.roster_names)} sites, sites={self.sites}; leave sites out",
            ),
            (
                bool(expected) and self.min_sites > expected,
                f"min-sites={self.min_sites} is more than {sites}; lower min-sites",
            ),
            (
                bool(expected) and selected < 1,
                f"participation={self.participation:g} of {sites} selects nobody; raise one of them",
            ),
            (
                self.min_sites <= expected and 1 <= selected < self.min_sites,
                f"participation={self.participation:g} of {sites} selects {selected} a round, "
                f"min-sites={self.min_sites} are wanted; raise participation or lower min-sites",
            ),
            (
                self.robust_rule == "trimmed-mean" and not self.byzantine_sites,
                "robust-rule=trimmed-mean with byzantine-sites=0 trims nobody; set byzantine-sites",
            ),
            (
                bool(expected) and 1 <= selected < needed,
                f"robust-rule={self.robust_rule} with byzantine-sites={self.byzantine_sites} needs "
                f"{needed} sites a round, {selected} train; add sites or lower byzantine-sites",
            ),
        ]

    @property
    def roster_names(self) -> tuple[str, ...]:
        """The names of the sites that take part; empty: whoever is connected."""
        return tuple(name.strip() for name in self.roster.split(",") if name.strip())

    @property
    def expected_sites(self) -> int:
        """How many sites take part; 0: as many as are connected."""
        return len(self.roster_names) or self.sites

    @property
    def wanted_sites(self) -> int:
        """How many sites the run waits for."""
        return self.expected_sites or self.min_sites

    def selected(self, sites: int) -> int:
        """How many of `sites` sites train in a round."""
        return round(self.participation * sites)
