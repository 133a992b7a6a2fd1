"""fedsplit's Flower ClientApp."""
