"""Floor 4: a site: its runtime, one round of it, its state on disk. Nothing of Flower, gRPC or the server."""
