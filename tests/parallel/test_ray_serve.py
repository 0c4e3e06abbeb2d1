"""examples/ray_serve on a Ray cluster of this machine: answers, a dead engine, a rolling change, the end."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from hayate import LLM, SamplingParams
from hayate.errors import UsageError
from tests.server.checkpoint import write_checkpoint

pytest.importorskip("ray", reason="Ray is not installed: pip install 'hayate[ray]'")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ray_serve"
SECONDS = 120.0  # for anything to happen; on an idle machine it takes a tenth
MESSAGES: list[Any] = [{"role": "user", "content": "What is gravity?"}]
LENGTHS = [2**i for i in range(8)]  # tokens; no two sets of requests have the same sum
WARM_UP = 3  # tokens that each replica makes before its first request


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.5)  # who asks more often slows down what it waits for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-chat")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # Ray listens at all addresses: nobody else may use the cluster
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the only machine: there is nowhere to move to
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{EXAMPLE}{os.pathsep}{ROOT / 'src'}",
    }


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[psutil.Process]:
    """A Ray cluster of this machine; at the end every process of it must be gone."""
    session = tempfile.mkdtemp(prefix="ray-")  # short: it holds sockets, whose paths have a limit
    port = environment["RAY_ADDRESS"] = f"127.0.0.2:{free_port()}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.2", "--port", port.split(":")[1], "--num-cpus", "2"),
        *("--include-dashboard", "false", "--object-store-memory", str(80 * 2**20)),
        *("--temp-dir", session),
    ]
    started = {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(command, env=started, stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout is not None
        for line in head.stdout:
            if "--block" in line:  # the last lines of its start
                break
        threading.Thread(target=head.stdout.read, daemon=True).start()
        process = psutil.Process(head.pid)
        try:
            yield process
        finally:
            all_of_it = [process, *process.children(recursive=True)]
            head.terminate()
            _, left = psutil.wait_procs(all_of_it, SECONDS)
            for p in left:
                p.kill()
            shutil.rmtree(session, ignore_errors=True)
    assert not left
    assert len(all_of_it) > 4, "the cluster was not among them"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def deploy(folder: Path, port: int, environment: dict[str, str], name: str, **engine: Any) -> None:
    """config.yaml with two replicas of the tiny model on the CPU; returns when they run."""
    config = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    config["http_options"]["port"] = port
    application = config["applications"][0]
    application["args"] = {
        "model": str(folder),
        "engine": {"device": "cpu", "kv_memory": "16M", **engine},
        "server": {"served_model_names": [name, "tiny"]},
    }
    deployment = application["deployments"][0]
    deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
    deployment["health_check_period_s"] = 0.5
    deployment["ray_actor_options"] = {"num_cpus": 0.5}
    changed = folder.parent / f"{name}.yaml"
    changed.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", str(changed)]
    done = subprocess.run(
        command, env=environment, timeout=2 * SECONDS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def replicas(cluster: psutil.Process) -> list[psutil.Process]:
    return [p for p in cluster.children(recursive=True) if p.name().startswith("ray::ServeRepl")]


def names(client: openai.OpenAI) -> list[str]:
    """The served names that a replica gives; none while there is no replica."""
    try:
        return [model.id for model in client.models.list()]
    except openai.APIError:
        return []


def answer(client: openai.OpenAI, max_tokens: int) -> str:
    result = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return result.choices[0].message.content or ""


@contextmanager
def asking(client: openai.OpenAI) -> Iterator[list[str]]:
    """The answers to 16 tokens that a client gets which asks all the while, and its errors, if any."""
    answers: list[str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.2):
            try:
                answers.append(answer(client, 16))
            except openai.APIError as error:
                answers.append(repr(error))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def tokens_of_replicas(port: int) -> set[int]:
    """How many tokens each replica has made: asked so often that each has answered."""
    pattern = re.compile(r"^hayate_generated_tokens_total (\S+)", re.MULTILINE)
    pages = [httpx.get(f"http://127.0.0.1:{port}/metrics").text for _ in range(12)]
    return {int(float(match[1])) for page in pages if (match := pattern.search(page))}


def rounds(client: openai.OpenAI, port: int, expected: list[str]) -> tuple[set[int], int]:
    """Ask for all lengths at once, again and again until both replicas serve and have made different numbers of
    tokens: these numbers, and the tokens asked for."""
    asked = 0

    def both() -> bool:
        nonlocal asked
        with ThreadPoolExecutor(len(LENGTHS)) as pool:
            assert list(pool.map(partial(answer, client), LENGTHS)) == expected
        asked += sum(LENGTHS)
        return len(tokens_of_replicas(port)) == 2

    until(both)
    return tokens_of_replicas(port), asked


@pytest.mark.slow
def test_life_of_an_application(
    folder: Path,
    environment: dict[str, str],
    cluster: psutil.Process,
    port: int,
    client: openai.OpenAI,
) -> None:
    llm = LLM(folder, device="cpu", kv_memory="16M")
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in LENGTHS]
    expected = [llm.chat(MESSAGES, p)[0].outputs[0].text for p in params]

    deploy(folder, port, environment, "first")
    until(lambda: names(client) == ["first", "tiny"])
    made, asked = rounds(client, port, expected)
    assert sum(made) == asked + 2 * WARM_UP

    before = replicas(cluster)
    assert len(before) == 2
    with asking(client) as answers:
        deploy(folder, port, environment, "second", tensor_parallel=2)
        until(lambda: not any(process.is_running() for process in before))
        rounds(client, port, expected)
    assert len(answers) > 5
    assert set(answers) == {expected[LENGTHS.index(16)]}, "a request failed while replicas changed"
    assert names(client) == ["second", "tiny"]

    victim, other = replicas(cluster)
    [worker] = victim.children()
    worker.kill()
    until(lambda: not victim.is_running())
    rounds(client, port, expected)
    assert other in replicas(cluster), "the healthy one stays"

    connections = [c for p in cluster.children(recursive=True) for c in p.net_connections()]
    remote = [ip_address(c.raddr.ip.removeprefix("::ffff:")) for c in connections if c.raddr]
    assert remote
    assert all(address.is_loopback for address in remote)


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # in Ray
def test_gpus_of_a_replica_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import replicas as example

    def gpus(**engine: Any) -> int:
        application = example.application(example.Arguments(model="x", engine=engine))
        return application._bound_deployment.ray_actor_options["num_gpus"]

    assert [gpus(), gpus(tensor_parallel=4), gpus(device="cpu", tensor_parallel=2)] == [1, 4, 0]
    for name, instead in (("port", "http_options"), ("api_keys", "HAYATE_API_KEY")):
        with pytest.raises(UsageError, match=f"args.server.{name}.*{instead}"):
            example.application(example.Arguments(model="x", server={name: None}))
