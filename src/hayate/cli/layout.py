"""Lines of a name and a value, aligned; plain text, so that a pipe gets the same as a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """One line a row, the values in one column."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
