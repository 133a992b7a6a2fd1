"""What a run's files say, for people: tables for the terminal, plots as PNG and SVG.

Reads `runs/<run>/` and nothing else. The CLI and the ServerApp call it; no floor below does. Plots (plots.py) and figures
need matplotlib, which a site does not have: they are imported where they are drawn.
"""

from fedsplit.report.read import read_metrics, read_status, read_summary, read_tasks
from fedsplit.report.tables import exit_text, lost_sites, summary_view, tasks_exit_text, tasks_view

__all__ = [
    "exit_text",
    "lost_sites",
    "read_metrics",
    "read_status",
    "read_summary",
    "read_tasks",
    "summary_view",
    "tasks_exit_text",
    "tasks_view",
]
