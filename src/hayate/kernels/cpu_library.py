"""The shared library of the native CPU kernels: compiled at first use, kept on disk, opened once.

It lies under `$HAYATE_HOME/native` (`~/.cache/hayate/native` by default), under a name that hashes
everything it depends on: sources, flags, processor and compiler. Without a compiler there is no
library, the PyTorch references run instead, and one line on standard error says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: F401  (its OpenMP runtime must be in the process first, to be shared)

_FOLDER = Path(__file__).parent
_SOURCES = tuple(
    _FOLDER / name for name in ("cpu.c", "cpu_attention.c", "cpu_nf4.c", "cpu_training.c")
)
_HEADERS = (_FOLDER / "cpu_nf4.h", _FOLDER / "cpu_vectors.h")
_FLAGS = ("-O2", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")


class Library(NamedTuple):
    """`hayate_run` of cpu.c, twice: the first form keeps Python's lock, the second gives it up."""

    path: Path
    run: Callable[[bytes, int], int]
    run_unlocked: Callable[[bytes, int], int]


class _BuildError(Exception):
    """Why there are no native kernels on this machine, and what would change that."""


def _cpu_name() -> str:
    """What `-march=native` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.startswith(kept))


def _library_path(compiler: str) -> Path:
    """Where the library lies, under a name that hashes source, flags, processor and compiler."""
    home = os.environ.get("HAYATE_HOME")
    folder = Path(home) if home else Path.home() / ".cache" / "hayate"
    real = os.path.realpath(compiler)
    status = os.stat(real)
    parts = (*_FLAGS, platform.machine(), _cpu_name(), real, status.st_size, status.st_mtime_ns)
    key = hashlib.sha256(b"\0".join(file.read_bytes() for file in (*_SOURCES, *_HEADERS)))
    key.update("\0".join(map(str, parts)).encode())
    return folder / "native" / f"{key.hexdigest()[:24]}.so"


def _compile(compiler: str, path: Path) -> None:
    """Build into a file of our own and rename it, so that processes may race."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise _BuildError(f"{' '.join(command[:1])} failed: {lines[0]}")
        built.replace(path)


def _open(path: Path) -> Library:
    def bind(library: ctypes.CDLL) -> Callable[[bytes, int], int]:
        run = library.hayate_run
        run.argtypes = (ctypes.c_char_p, ctypes.c_int64)
        run.restype = ctypes.c_int64
        return run

    return Library(path, bind(ctypes.PyDLL(str(path))), bind(ctypes.CDLL(str(path))))


def _build() -> Library:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise _BuildError("no C compiler (cc, gcc or clang) on the PATH; install one, e.g. gcc")
    try:
        path = _library_path(compiler)
        if not path.exists():
            _compile(compiler, path)
        try:
            return _open(path)
        except OSError:  # damaged on disk, or its OpenMP runtime is gone
            _compile(compiler, path)
            return _open(path)
    except OSError as error:
        raise _BuildError(f"{error}; HAYATE_HOME names another folder for the library") from error


@cache
def _load() -> tuple[Library | None, str]:
    """The library, or None; and a line about it."""
    try:
        library = _build()
    except _BuildError as error:
        return None, f"not available: {error}"
    return library, f"ready: {library.path}"


@cache
def library() -> Library | None:
    loaded, status = _load()
    if loaded is None:
        print(f"hayate: native CPU kernels {status}; using PyTorch's, slower", file=sys.stderr)
    return loaded


def native_status() -> str:
    """For `hayate env`: "ready: FILE" or "not available: why, what to do". May compile."""
    return _load()[1]
