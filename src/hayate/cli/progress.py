"""A bar on standard error while something long runs; nothing when that is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """Gives `progress(bytes done, bytes in all)`, or None when nobody would see the bar."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _bar(*columns) as progress:
        yield progress


@contextmanager
def counting_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Gives `progress(done, in all)`, or None when nobody would see the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(*columns) as progress:
        yield progress


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, start=False, visible=False)

        def update(done: int, total: int) -> None:
            bar.start_task(task)
            bar.update(task, completed=done, total=total, visible=True)

        yield update
