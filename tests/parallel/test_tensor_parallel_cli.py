"""`--tensor-parallel` on the command line: the same text, and however it ends, all processes end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hayate import LLM, SamplingParams
from tests.parallel import tensor_models

SECONDS = 15.0  # for all processes to be gone; on an idle machine it takes a tenth


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tensor_models.make("llama", tmp_path_factory.mktemp("model") / "llama")


def command(folder: Path, max_tokens: int, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "hayate", "generate", "--model", str(folder), "--prompt", "Once"),
        *("--device", "cpu", "--temperature", "0", "--ignore-eos", "--max-tokens", str(max_tokens)),
        *more,
    ]


def workers_of(pid: int) -> list[int]:
    """The child processes of `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def generating(folder: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A run with 2000 tokens to go, its first text written, and its worker's process id."""
    process = subprocess.Popen(
        command(folder, 2000, "--tensor-parallel", "2"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    worker = None
    try:
        assert process.stdout is not None
        assert process.stdout.read(1), "the first text"
        (worker,) = workers_of(process.pid)
        yield process, worker
    finally:
        process.kill()
        process.communicate()
        deadline = time.monotonic() + SECONDS
        while worker is not None and is_alive(worker):
            if time.monotonic() > deadline:
                os.kill(worker, signal.SIGKILL)
                pytest.fail(f"worker {worker} outlived rank 0")
            time.sleep(0.05)


def test_the_text_is_that_of_one_process(folder: Path) -> None:
    run = subprocess.run(
        command(folder, 30, "--tensor-parallel", "2", "--verbose"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=30)
    assert (
        run.stdout == LLM(folder, device="cpu").generate("Once", params)[0].outputs[0].text + "\n"
    )
    assert "2 processes from cpu on" in run.stderr


def test_a_killed_worker_ends_the_run(folder: Path) -> None:
    with generating(folder) as (process, worker):
        os.kill(worker, signal.SIGKILL)
        _, message = process.communicate(timeout=SECONDS)
    assert process.returncode == 6
    assert f"rank 1 of 2 (process {worker}) was killed by SIGKILL" in message.decode()


def test_a_killed_rank_0_leaves_no_orphan(folder: Path) -> None:
    with generating(folder) as (process, _):
        process.kill()  # leaving `generating` looks for the worker


def test_interrupt_ends_all(folder: Path) -> None:
    with generating(folder) as (process, _):
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert message.decode().splitlines()[-1] == "hayate: interrupted"


def test_what_cannot_be_is_refused_at_once(folder: Path) -> None:
    run = subprocess.run(
        command(folder, 5, "--tensor-parallel", "3"), capture_output=True, timeout=60
    )
    assert run.returncode == 2
    assert b"--tensor-parallel 3: the 8 attention heads cannot be split equally" in run.stderr
