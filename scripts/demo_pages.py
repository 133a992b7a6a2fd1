"""Put the demo's tables and pictures into README.md and docs/tutorials/first-run.md, where `<!-- demo: PART -->` stands.

The indented block below such a line is replaced; the parts are accuracy, cost and whole.

    python scripts/demo_pages.py              run `fedsplit demo`, some minutes, then write
    python scripts/demo_pages.py --run DIR    take a demo that has been run
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from fedsplit.core.records import Summary
from fedsplit.report import summary_view

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "tutorials" / "first-run.md")
PICTURES = ("accuracy", "traffic")
PARTS = ("accuracy", "cost", "whole")
_WIDTH = 150
_BLOCK = re.compile(r"(<!-- demo: (\w+) -->\n\n)(?:    .*\n|\n(?=    ))+")


def run_demo() -> Path:
    """Run the demo; the folder that it left."""
    command = [sys.executable, "-m", "fedsplit.cli.main", "demo", "--json", "--app", str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(json.loads(done.stdout)["run_dir"])


def parts_of(summary: Summary) -> dict[str, str]:
    """Part -> the table as the command line shows it. Raises ValueError for a run that has others."""
    out = io.StringIO()
    Console(file=out, width=_WIDTH, highlight=False).print(summary_view(summary))
    blocks = out.getvalue().strip("\n").split("\n\n")[1:]
    if len(blocks) != len(PARTS):
        raise ValueError(f"the run shows {len(blocks)} tables, a demo has {len(PARTS)}")
    return dict(zip(PARTS, blocks, strict=True))


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with its blocks replaced. Raises KeyError for a part that there is not."""

    def block(match: re.Match[str]) -> str:
        lines = (f"    {line}".rstrip() for line in parts[match[2]].splitlines())
        return match[1] + "\n".join(lines) + "\n"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Write the pages and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a demo that has been run")
    folder = parser.parse_args().run or run_demo()
    summary = Summary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
    parts = parts_of(summary)
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    for name in PICTURES:
        shutil.copy(folder / f"{name}.png", ROOT / "docs" / "images" / f"demo-{name}.png")


if __name__ == "__main__":
    main()
