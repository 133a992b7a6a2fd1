"""Grids that run the sites in this process, for many small runs and for tests."""
