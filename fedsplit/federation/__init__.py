"""Floor 4: the Flower floor: strategy, messages, the site's round, run directories. No server code on devices."""
