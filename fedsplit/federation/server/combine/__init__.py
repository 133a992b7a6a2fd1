"""A round's updates -> the next module: checks, bounds, rules, the best so far."""
