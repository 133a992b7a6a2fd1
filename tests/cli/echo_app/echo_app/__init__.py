"""A Flower app that writes a run's files without training anything. `task` says how it behaves."""
