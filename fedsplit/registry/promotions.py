"""What the moves of an alias come to: where a rollback goes, and who was faster."""

from __future__ import annotations

from collections.abc import Iterable

from fedsplit.registry.books import Books
from fedsplit.registry.version import Promotion


def earlier(history: Iterable[Promotion], alias: str, there: set[str]) -> str:
    """The digest that a rollback of an alias goes to, of those that are still there; empty where there is none."""
    stack: list[str] = []
    for move in history:
        if move.alias != alias:
            continue
        if move.kind == "rollback" and move.digest in stack:
            # What was promoted after it is undone.
            last = len(stack) - 1 - stack[::-1].index(move.digest)
            del stack[last + 1 :]
        else:
            stack.append(move.digest)
    if not stack:
        return ""
    now = stack.pop()
    return next((d for d in reversed(stack) if d != now and d in there), "")


def moved_meanwhile(books: Books, task: str, alias: str, now: str, expected: str) -> str:
    """What to tell whose promotion came second."""
    last = next((p for p in reversed(books.history(task)) if p.alias == alias), None)
    by = f" by {last.by}" if last is not None and last.by else ""

    def name(digest: str) -> str:
        return next(
            (v.name for v in books.of_digest(digest) if v.task == task), digest[:12] or "no version"
        )

    return (
        f"{task}@{alias} moved meanwhile{by}: it points to {name(now)}, not to {name(expected)} any more; nothing was "
        f"changed. Look at it (`fedsplit module show {task}@{alias}`) and promote again if you still want to"
    )
