"""Floor 3: data, algorithms, the round."""
