"""`make bench`: ratios of interleaved runs against a rival in the same run, written to benchmarks/results/.

registry.py lists the benchmarks and their targets, paired.py interleaves, __main__.py runs and reports. Each benchmark is a
module with `run() -> dict`: name, value, unit, compared_with, ratio, pairs, and whatever else its numbers need beside them.
"""
