"""fedsplit's Flower ServerApp."""
