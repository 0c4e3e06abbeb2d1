"""Which cubins `make kernels` builds: every kernel for every architecture, every specialisation once at least."""

from __future__ import annotations

import hayate.kernels
import hayate.kernels.training  # noqa: F401
from hayate.bench.compile_kernels import ARCHITECTURES, covering_jobs
from hayate.kernels._triton import COMPILE_CASES, CompileCase


def case(kernel: str, name: str, size: int, low: int = 80, high: int = 999) -> CompileCase:
    return CompileCase(kernel, name, {}, {"SIZE": size}, min_cc=low, max_cc=high)


def test_names_are_unique() -> None:
    names = [case.name for case in COMPILE_CASES]
    assert len(names) == len(set(names))


def test_every_kernel_is_compiled_for_every_architecture_that_launches_it() -> None:
    jobs = covering_jobs(COMPILE_CASES, ARCHITECTURES)
    assert len(jobs) == len(set(jobs))
    compiled = {(COMPILE_CASES[index].kernel, arch) for index, arch in jobs}
    for case in COMPILE_CASES:
        for arch in ARCHITECTURES:
            if case.min_cc <= arch <= case.max_cc:
                assert (case.kernel, arch) in compiled, (case.name, arch)
    for index, arch in jobs:
        assert COMPILE_CASES[index].min_cc <= arch <= COMPILE_CASES[index].max_cc


def test_further_sizes_take_turns_and_copies_are_left_out() -> None:
    cases = [
        case("a", "a_narrow_sm80", 1, 80, 89),
        case("a", "a_wide_sm90", 2, 90, 90),
        case("a", "a_narrow_sm120", 1, 120, 120),
        case("a", "a_long_sm80", 3, 80, 89),
        case("a", "a_longer_sm80", 4, 80, 89),
        case("a", "a_long_sm120", 3, 120, 120),  # but for the architecture, a_long_sm80
        case("b", "b", 1),
    ]
    assert covering_jobs(cases, (80, 89, 90, 120)) == [
        (0, 80),
        (0, 89),
        (1, 90),
        (2, 120),
        (3, 80),
        (4, 89),
        *((6, arch) for arch in (80, 89, 90, 120)),
    ]
