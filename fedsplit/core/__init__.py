"""Floor 1: errors, cut, config, the Encoder protocol, aggregation. No torch, no grpc, no flwr here."""
