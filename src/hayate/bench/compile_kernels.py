"""Compile every registered Triton kernel for every architecture we support; no GPU is needed.

    python -m hayate.bench.compile_kernels [--arch 80,90] [--match gemv | --all] [--jobs 2] [--json]

By itself it compiles what `covering_jobs` picks, a third of all: every kernel for every architecture, every
specialisation for one. With --match or --all each specialisation is compiled for all its architectures.
Prints registers, stack (spilled registers land there) and shared memory of each cubin, as
cuobjdump reads them. Exit status 1 when a kernel does not compile, spills without being excepted
(`may_spill`), asks for more shared memory than a block of that architecture may have, or loads
what it streams (marked evict-first: weights) in pieces of less than 16 bytes a lane.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hayate.kernels._triton import COMPILE_CASES, HAS_TRITON, CompileCase, triton

__all__ = [
    "ARCHITECTURES",
    "SHARED_LIMIT",
    "CompileResult",
    "compile_case",
    "covering_jobs",
    "main",
]

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# Most shared memory one block may ask for, in bytes (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: kib * 1024 for arch, kib in SHARED_LIMIT.items()}

# A few registers put away over a loop are ptxas' own bargain for occupancy, and cost nothing; a
# kernel whose working set does not fit spills hundreds of bytes.
TOLERATED_STACK = 16

# In PTX, a load marked evict-first, and the vectors of it that are 16 bytes or more.
_STREAMING_LOAD = re.compile(r"ld\.global\S*evict_first\S*")
_WIDE = re.compile(r"v4\.[bf]32|v2\.[bf]64|v8\.[bf]32|v4\.[bf]64")

# `Function name: REG:40 STACK:0 SHARED:1024 LOCAL:0 ...` of cuobjdump --dump-resource-usage
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class CompileResult:
    """One cubin: `registers` a thread, `stack` and `shared` in bytes; or why there is none."""

    kernel: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    milliseconds: float = 0.0
    error: str = ""  # empty: it compiled and keeps the limits


def compile_case(case: CompileCase, arch: int) -> tuple[CompileResult, bytes]:
    """Build `case` for `arch`; returns the figures and the cubin, empty without one."""
    start = time.perf_counter()
    try:
        compiled = _compile(case, arch)
    except Exception as failure:  # Triton raises many kinds; each is a finding about this kernel
        message = (str(failure).strip() or type(failure).__name__).splitlines()[-1]
        return CompileResult(case.name, arch, error=f"does not compile: {message}"), b""
    elapsed = 1e3 * (time.perf_counter() - start)
    cubin = compiled.asm["cubin"]
    registers, stack = _resource_usage(cubin)
    shared = compiled.metadata.shared
    narrow = [i for i in _STREAMING_LOAD.findall(compiled.asm["ptx"]) if not _WIDE.search(i)]
    error = ""
    if stack > TOLERATED_STACK and not case.may_spill:
        error = f"spills {stack} bytes of registers to the stack"
    elif narrow:
        error = f"streams with narrow loads: {narrow[0]}"
    elif shared > SHARED_LIMIT[arch]:
        error = f"{shared} bytes of shared memory, a block has {SHARED_LIMIT[arch]}"
    return CompileResult(case.name, arch, registers, stack, shared, elapsed, error), cubin


def _compile(case: CompileCase, arch: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(case.constexprs)
    pdl = "PDL" in case.kernel.arg_names and arch >= 90
    if "PDL" in case.kernel.arg_names:
        constexprs["PDL"] = pdl
    signature: dict[str, str] = {}
    attributes = {}
    for i, name in enumerate(case.kernel.arg_names):
        kind = "constexpr" if name in constexprs else case.signature[name]
        signature[name] = kind.removesuffix(":16")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(case.kernel.arg_names.index(n),): v for n, v in constexprs.items()},
        attrs=attributes,
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "launch_pdl": pdl}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of a cubin with one kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = _USAGE.search(text)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return int(match[1]), int(match[2])


def covering_jobs(cases: Sequence[CompileCase], archs: Sequence[int]) -> list[tuple[int, int]]:
    """(index, architecture) pairs, so that every kernel is compiled for each architecture that launches it.

    The first case of a kernel that an architecture launches is compiled for it. The further cases, other sizes
    and options, are compiled for one architecture each, in turns; but not those that differ from an earlier
    one in their architectures alone.
    """
    jobs: list[tuple[int, int]] = []
    covered: set[tuple[Any, int]] = set()
    seen: set[str] = set()
    turns: Counter[Any] = Counter()
    for index, case in enumerate(cases):
        own = _architectures(case, archs)
        picked = [arch for arch in own if (case.kernel, arch) not in covered]
        specialisation = repr(replace(case, name="", min_cc=0, max_cc=0))
        if own and not picked and specialisation not in seen:
            picked = [own[turns[case.kernel] % len(own)]]
            turns[case.kernel] += 1
        seen.add(specialisation)
        covered.update((case.kernel, arch) for arch in picked)
        jobs += [(index, arch) for arch in picked]
    return jobs


def _architectures(case: CompileCase, archs: Sequence[int]) -> list[int]:
    return [arch for arch in archs if case.min_cc <= arch <= case.max_cc]


def _compile_numbered(job: tuple[int, int]) -> CompileResult:
    index, arch = job
    return compile_case(COMPILE_CASES[index], arch)[0]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compile every Triton kernel; needs no GPU")
    parser.add_argument(
        "--arch",
        default=",".join(map(str, ARCHITECTURES)),
        help="compute capabilities without the dot, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--match", default="", help="all cases whose name has this in it")
    parser.add_argument("--all", action="store_true", help="all cases for all architectures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args(arguments)
    options.arch = [int(a) for a in options.arch.split(",")]
    unknown = sorted(set(options.arch) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"--arch {unknown[0]}: choose from {', '.join(map(str, ARCHITECTURES))}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parse(arguments)
    if not HAS_TRITON:
        print("Triton is not installed, nothing can be compiled: pip install triton")
        return 1
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
        return 1
    # Each file registers its kernels as it is imported.
    import hayate.kernels
    import hayate.kernels.training  # noqa: F401

    if options.all or options.match:
        jobs = [
            (index, arch)
            for index, case in enumerate(COMPILE_CASES)
            for arch in _architectures(case, options.arch)
            if options.match in case.name
        ]
    else:
        jobs = covering_jobs(COMPILE_CASES, options.arch)
    start = time.perf_counter()
    failures = 0
    if not options.json:
        print(f"{'kernel':58} {'arch':>4} {'registers':>9} {'spills':>6} {'shared':>7} {'ms':>6}")
    # Forked workers share the imported kernels. Threads would wait for each other: the compiler
    # holds Python's lock.
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for result in pool.imap(_compile_numbered, jobs, chunksize=1):
            failures += bool(result.error)
            print(json.dumps(asdict(result)) if options.json else _row(result), flush=True)
    if not options.json:
        seconds = time.perf_counter() - start
        print(f"{len(jobs)} cubins in {seconds:.0f} s, {failures} failures")
    return 1 if failures else 0


def _row(result: CompileResult) -> str:
    figures = f"{result.registers:9} {result.stack:6} {result.shared:7} {result.milliseconds:6.0f}"
    problem = f"  {result.error}" if result.error else ""
    return f"{result.kernel:58} {result.arch:4} {figures}{problem}"


if __name__ == "__main__":
    sys.exit(main())
