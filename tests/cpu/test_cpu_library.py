"""The building of the native CPU kernels: without a compiler, raced by two processes, damaged on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hayate.kernels import cpu, cpu_library

needs_compiler = pytest.mark.skipif(
    not cpu.native_status().startswith("ready"), reason="no C compiler on this machine"
)


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty HAYATE_HOME, and no library loaded before or after."""
    monkeypatch.setenv("HAYATE_HOME", str(tmp_path))
    cpu_library._load.cache_clear()
    cpu_library.library.cache_clear()
    yield tmp_path
    cpu_library._load.cache_clear()
    cpu_library.library.cache_clear()


def test_without_a_compiler_nothing_fits_and_it_is_said_once(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    x, cache = torch.zeros(1, 16), torch.zeros(2, 4, 1, 8)
    assert not cpu.linear_fits(x, torch.zeros(8, 16))
    assert not cpu.linear_fits(x, torch.zeros(8, 16))
    assert not cpu.attention_fits(torch.zeros(1, 2, 8), cache, cache, 1)
    assert not cpu.rope_and_cache_fits(torch.zeros(1, 24), cache, cache)
    assert not cpu.argmax_fits(x)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no C compiler" in err
    assert cpu.native_status().startswith("not available: no C compiler")
    assert not (fresh_home / "native").exists()


def test_a_failing_compiler_is_reported_and_leaves_nothing(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh_home / "bin"
    folder.mkdir()
    (folder / "cc").write_text("#!/bin/sh\necho 'cpu.c:1: error: no omp.h' >&2\nexit 1\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert "no omp.h" in cpu.native_status()
    assert list((fresh_home / "native").iterdir()) == []


def test_a_home_that_cannot_be_written_is_reported(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh_home / "file").touch()
    monkeypatch.setenv("HAYATE_HOME", str(fresh_home / "file"))
    status = cpu.native_status()
    assert status.startswith("not available")


def _build_when_told(barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(str(cpu_library._build().path))


@needs_compiler
def test_two_processes_may_build_at_once_and_a_damaged_library_is_rebuilt(fresh_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    children = [context.Process(target=_build_when_told, args=(barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert results.get() == results.get()
    (path,) = (fresh_home / "native").iterdir()
    assert cpu.native_status() == f"ready: {path}"

    path.unlink()  # the mapped file stays as it is
    path.write_bytes(b"not a library")
    cpu_library._load.cache_clear()
    assert cpu.native_status() == f"ready: {path}"
    assert torch.equal(cpu.linear(torch.ones(1, 3), torch.ones(2, 3)), torch.full((1, 2), 3.0))
