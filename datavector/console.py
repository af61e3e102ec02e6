"""What a person sees: lines of text, and progress (a bar on a terminal, now and then a line in a log)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

LINE_SECONDS = 10.0

Progress = Callable[[int, int], None]
"""Called with the amount done and the total, in any unit."""


def say(text: str) -> None:
    """One line on standard output; a log gets the time before it."""
    prefix = "" if sys.stdout.isatty() else f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} "
    print(prefix + text, flush=True)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are beside."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """Shows how far a long piece of work is, until the block ends."""
    if not sys.stdout.isatty():
        yield _Lines(label)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Progress for a log: a line at most every ten seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._next = time.monotonic() + LINE_SECONDS

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            say(f"{self.label}: {done / max(total, 1):.0%}")
