"""A round's updates -> the next module: what devices sent, what the encoder trained for them, the server's rule.

The mathematics is core/lora_rules.py's and rules.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedsplit.core.aggregation import Update, check_update
from fedsplit.core.config import RunConfig
from fedsplit.core.errors import ConfigError, EncoderError, RoundLostError, UpdateError
from fedsplit.core.lora_rules import Rule
from fedsplit.federation.server.combine.rules import ServerRule
from fedsplit.federation.server.orders import Orders
from fedsplit.model.module import ModuleTensors


class Combiner:
    """Combines the updates of a run's rounds; `rule` holds what the server's optimiser remembers."""

    def __init__(
        self, config: RunConfig, rule: Rule, orders: Orders, *, on_update: Callable[[str], None]
    ) -> None:
        """Raises ConfigError for rules that cannot go together."""
        self.config = config
        self.orders = orders
        self.rule = ServerRule(
            rule,
            optimizer=config.server.server_optimizer,
            learning_rate=config.server.server_learning_rate,
            momentum=config.server.server_momentum,
            robust_rule=config.server.robust_rule,
            byzantine_sites=config.server.byzantine_sites,
        )
        self._say = on_update

    def check(self) -> None:
        """Raise ConfigError now where a setting could never work with these sites and their cuts."""
        if (
            self.config.placement.encoder_training == "shared"
            and len({s.cut for s in self.orders.sites}) > 1
        ):
            raise ConfigError(
                "encoder-training=shared wants one cut for all sites; change the sites' own cuts, or use "
                "encoder-training=hosted"
            )
        names = {
            site.name: self.orders.plan(site, self.config.train.rounds).sent
            for site in self.orders.sites
        }
        self.rule.check(names)

    def combine(self, round_: int, module: ModuleTensors, updates: list[Update]) -> ModuleTensors:
        """The next module, from what the devices sent and what the encoder trained.

        Raises RoundLostError, with nothing changed, where the encoder lost what it trained the first time.
        """
        received = {site.name: self.orders.received(site, module) for site in self.orders.sites}
        hosted = self._hosted(round_)
        if hosted:
            updates = [self._with_hosted(module, u, hosted.get(u.site, {})) for u in updates]
            received = {name: {**module, **own} for name, own in received.items()}
            shared = hosted.get("", {})
            module = module | {name: module[name] + delta for name, delta in shared.items()}
        if not any(u.delta for u in updates):
            return module
        combined = self.rule.combine(module, updates, received, round_)
        if self.rule.held_back:
            self._say(
                f"round {round_}: {len(self.rule.held_back)} tensors stay as they were, too few sites "
                f"trained them for robust-rule={self.config.server.robust_rule}"
            )
        return combined

    def _hosted(self, round_: int) -> dict[str, ModuleTensors]:
        """What the encoder trained in a round: site -> deltas, under "" those of a shared copy."""
        if self.config.placement.encoder_training == "frozen" or self.orders.all_local:
            return {}
        try:
            return self.orders.endpoint.collect(self.orders.version(round_))
        except EncoderError as err:
            why = f"what the encoder trained could not be collected: {err}"
            if round_ not in self.orders.repeated:
                raise RoundLostError(f"round {round_}: {why}", why=why) from err
            # What the devices trained is not to be lost with it.
            self._say(f"round {round_}: {why}")
            return {}

    def _with_hosted(self, module: ModuleTensors, update: Update, delta: ModuleTensors) -> Update:
        """A site's update with what the encoder trained on its behalf; that alone is dropped where it is bad."""
        on_behalf = Update(site=update.site, samples=update.samples, delta=delta)
        try:
            check_update(on_behalf, module=module, trained=delta.keys(), samples=update.samples)
        except UpdateError as err:
            self._say(f"what the encoder trained: {err}")
            return update
        return replace(update, delta={**update.delta, **delta})
