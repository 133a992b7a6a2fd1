"""What a run writes down: its account, its directory, the scalars of its rounds."""
