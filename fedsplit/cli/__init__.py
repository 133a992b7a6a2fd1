"""The command line: thin commands over the floors below. `main.py` is the entry, `run.py` the main job."""
