"""Floor 2: torch, transformers and peft: backbones, their parts, the module and the seam. No grpc, no flwr."""
