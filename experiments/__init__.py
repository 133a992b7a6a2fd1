"""What makes the numbers of docs/results.md: grids, their data, and the leakage measurement."""
