"""Floor 2: the gRPC wire between a site and the encoder. No torch, no flwr; only this floor imports grpc.

Sites import `transport.client`, the encoder's process `transport.server`, the ServerApp `transport.tokens` and
`transport.client.publish`; nothing is re-exported here, so that a device never loads server code. docs/protocol.md
has the bytes.
"""
