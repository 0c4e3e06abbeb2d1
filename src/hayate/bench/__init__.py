"""Benchmarks: the ceiling first, then the result as a share of it, after a correctness gate."""
