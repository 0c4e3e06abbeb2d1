"""Several processes compute what one computes: the model's parts, the forward pass, the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.placements import Placement
from hayate.checkpoint.reader import CHUNK_BYTES, load_checked
from hayate.errors import DeviceError, ModelError, UsageError
from hayate.models.presets import preset_config
from hayate.models.sharding import check_shardable, split
from hayate.runtime.async_llm import AsyncLLM
from hayate.runtime.llm import LLM
from hayate.runtime.ranks import device_of
from hayate.sampling_params import SamplingParams, StructuredOutput
from tests.parallel import tensor_models
from tests.parallel.forward_rank import SIZES

MODELS = ("llama", "llama-bias-tied", "nemotron", "qwen2", "mixtral", "qwen3-moe")
IDS = [(7 * i * i + 3) % 250 for i in range(40)]
PAGE_BYTES = 64 * 3 * 2 * 16 * 4  # of the cache, for one key-value head


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tensor_models.make(name, folder / name)
    return folder


# -- what each process owns --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("count", [7 * 8, 90, 211, 267, 768, 151_936, 28_672])
def test_split_covers_everything_once_and_evenly(count: int, size: int) -> None:
    parts = split(count, size)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(parts))
    assert (parts[0][0], parts[-1][1], len(parts)) == (0, count, size)
    lengths = [stop - start for start, stop in parts]
    assert min(lengths) > 0
    assert lengths[0] == max(lengths), "plans are made for rank 0"
    if count % size == 0:
        assert min(lengths) == max(lengths)
    else:
        assert max(lengths) - min(lengths) <= 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reader_reads_boxes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rows and columns, larger and smaller than a chunk, with a cast and without, against slices of the tensor."""
    from safetensors.torch import save_file

    rows = CHUNK_BYTES // (4 * 512) + 5  # of 512 columns: a little more than a chunk
    x = torch.randn(rows, 512)
    save_file({"y": torch.zeros(3), "x": x}, tmp_path / "model.safetensors")
    every = slice(None)
    boxes = [(slice(3, rows - 1),), (every, slice(1, 511)), (every, slice(511, 512))]
    parameters = {
        str(i): torch.full((3, *x[box].shape), 7.0, dtype=dtype) for i, box in enumerate(boxes)
    }
    placements = [Placement("x", str(i), (1,), box) for i, box in enumerate(boxes)]
    report = load_checked(Checkpoint.open(tmp_path), parameters, placements, threads=2)
    assert report.num_bytes == sum(4 * x[box].numel() for box in boxes), "nothing else is read"
    for parameter, box in zip(parameters.values(), boxes, strict=True):
        torch.testing.assert_close(parameter[1], x[box].to(dtype), rtol=0, atol=0)
        assert (parameter[[0, 2]] == 7).all()


class TestRefusals:
    """Each names what stands in the way; no process is started for it."""

    @pytest.mark.parametrize(
        ("changes", "size", "text"),
        [
            ({"qk_norm": "full"}, 2, "queries and the keys of all heads together"),
            ({}, 5, "32 attention heads"),
            ({}, 0, "at least 1"),
            ({"num_heads": 12, "num_kv_heads": 6}, 4, "6 key-value heads"),
            ({"nf4_modules": frozenset({"lm_head"})}, 2, "NF4"),
            ({"vocab_size": 7}, 8, "vocabulary .7."),
            ({"ffn_size": 3}, 4, "MLP .3."),
        ],
    )
    def test_models(self, changes: dict, size: int, text: str) -> None:
        config = preset_config("llama-3.1-8b")
        check_shardable(config, 16)  # two processes for each key-value head
        with pytest.raises(UsageError, match=f"--tensor-parallel {size}: .*{text}"):
            check_shardable(dataclasses.replace(config, **changes), size)

    def test_images(self) -> None:
        with pytest.raises(UsageError, match=r"--tensor-parallel 2: .*images"):
            check_shardable(preset_config("minicpm-v-2.6-int4"), 2)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"speculative": "ngram"}, "--speculative ngram"),
            ({"batch_invariant": True}, "invariant"),
        ],
    )
    def test_options(self, folders: Path, options: dict, text: str) -> None:
        with pytest.raises(UsageError, match=f"{text} needs --tensor-parallel 1"):
            LLM(folders / "llama", device="cpu", tensor_parallel=2, **options)

    def test_devices_follow_rank_0(self) -> None:
        assert device_of(2, torch.device("cuda", 1)) == torch.device("cuda", 3)
        assert device_of(2, torch.device("cpu")) == torch.device("cpu")
        if torch.cuda.device_count() < 64:
            with pytest.raises((DeviceError, UsageError)):
                LLM.from_random("llama-3.1-8b", device="cuda", tensor_parallel=64)


# -- the forward pass --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 4 processes computed: (logits, bytes read, bytes owned) in a file for each model, size and rank."""
    out = tmp_path_factory.mktemp("logits")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [str(port), str(out), ",".join(map(str, IDS)), *(str(folders / m) for m in MODELS)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.forward_rank", str(rank), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
        for rank in range(max(SIZES))
    ]
    try:
        assert [p.wait(timeout=180) for p in running] == [0] * len(running)
    finally:
        for process in running:
            process.kill()
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_one_process(
    folders: Path, computed: Path, name: str, size: int
) -> None:
    one = LLM(folders / name, device="cpu", kv_memory=2**22)
    expected = one.logits(IDS)
    results = [torch.load(computed / f"{name}-{size}-{rank}.pt") for rank in range(size)]
    for logits, _, _ in results[1:]:
        assert torch.equal(logits, results[0][0]), "every rank must draw the same token"
    # Sums of up to 90 terms in another order differ by some sqrt(90) roundings of 2^-24; 7 such sums in each of 3
    # layers follow each other, and five standard deviations are allowed.
    limit = 5 * 2.0**-24 * math.sqrt(90 * 7 * 3) * float(expected.abs().max())
    assert float((results[0][0] - expected).abs().max()) < limit
    whole = sum(p.nbytes for p in one.engine.runner.model.parameters())
    for _, read, owned in results:
        assert read == owned, "a process reads its own share and no more"
        # The largest share, and norms, router and replicated key-value heads, which all have.
        assert owned < whole * (1 / size + 0.12)


# -- the engine --------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def prompts(count: int) -> list[list[int]]:
    """Of 5 to 200 tokens; most begin alike."""
    draw = random.Random(0)
    shared = [draw.randrange(250) for _ in range(140)]
    return [
        shared[: draw.randrange(140)] + [draw.randrange(250) for _ in range(draw.randrange(5, 60))]
        for _ in range(count)
    ]


def test_a_checkpoint_that_does_not_fit(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "llama", tmp_path / "odd")
    text = (
        (folder / "config.json")
        .read_text()
        .replace('"intermediate_size": 90', '"intermediate_size": 92')
    )
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"has shape \[90, 64\]"):
        LLM(folder, device="cpu", tensor_parallel=2)


def test_async_over_two_processes(folders: Path) -> None:
    """A process is killed at the end: whoever waits, and whoever comes later, is told."""
    # As a group that could not be made leaves it: this must not keep the processes from meeting.
    torch.distributed.distributed_c10d._process_group_name([], use_hashed_name=False)
    many = prompts(6)
    one = LLM(folders / "mixtral", device="cpu", kv_memory=2**22)
    expected = [o.outputs[0].text for o in one.generate(many, GREEDY)]

    async def main() -> None:
        llm = AsyncLLM(folders / "mixtral", device="cpu", kv_memory=2**22, tensor_parallel=2)
        async with llm:
            stream = llm.stream(many[2], GREEDY)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            together = await asyncio.gather(*(llm.generate(p, GREEDY) for p in many))
            assert [t[0].outputs[0].text for t in together] == expected
            (pid,) = llm.engine.ranks.pids  # type: ignore[attr-defined]
            os.kill(pid, 9)
            with pytest.raises(
                Exception, match=f"rank 1 of 2 .process {pid}. was killed by SIGKILL"
            ):
                await llm.generate(many, GREEDY)
            assert llm.dead is not None

    asyncio.run(main())


@pytest.fixture(scope="module")
def pair(folders: Path) -> Iterator[tuple[LLM, LLM]]:
    """The same model in one process and in two, with caches of 12 pages: four sequences at once are too many."""
    options = {"device": "cpu", "max_num_batched_tokens": 128, "max_num_seqs": 6}
    one = LLM(folders / "llama", kv_memory=2 * 12 * PAGE_BYTES, **options)  # type: ignore[arg-type]
    two = LLM(folders / "llama", kv_memory=12 * PAGE_BYTES, tensor_parallel=2, **options)  # type: ignore[arg-type]
    assert one.plan.num_pages == two.plan.num_pages == 12
    yield one, two
    two.close()
    with pytest.raises(UsageError, match="closed"):
        two.generate(IDS, GREEDY)


PARAMS = {
    "greedy": GREEDY,
    "seed": SamplingParams(temperature=0.9, seed=5, top_p=0.9, max_tokens=40, n=2),
    "penalties": SamplingParams(
        temperature=0,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        max_tokens=40,
    ),
    "json": SamplingParams(
        temperature=1, seed=3, max_tokens=40, structured=StructuredOutput.json_object()
    ),
    "stop": SamplingParams(temperature=0, logprobs=2, stop=("e",), min_tokens=5, max_tokens=30),
    "no seed": SamplingParams(temperature=1, max_tokens=40, ignore_eos=True),
}


def test_requests_of_all_kinds_together(pair: tuple[LLM, LLM]) -> None:
    """Chunked prefill, a shared prefix, preemption, penalties, grammars, stop strings; all in one batch."""
    one, two = pair
    many = prompts(18)
    params = [list(PARAMS.values())[i % len(PARAMS)] for i in range(len(many))]
    for _ in range(2):  # the second time from the prefix cache
        expected, got = one.generate(many, params), two.generate(many, params)
        for a, b, p in zip(expected, got, params, strict=True):
            if p is PARAMS["no seed"]:
                assert [len(o.token_ids) for o in b.outputs] == [40]
                continue
            assert [o.token_ids for o in b.outputs] == [o.token_ids for o in a.outputs]
            assert [o.text for o in b.outputs] == [o.text for o in a.outputs]
            assert [o.finish_reason for o in b.outputs] == [o.finish_reason for o in a.outputs]
    assert two.stats().num_preemptions > 0
    assert two.stats().num_prefix_tokens_found > 0
    two.engine.scheduler.check()


def test_aborts_and_timeouts_reach_all_ranks(pair: tuple[LLM, LLM]) -> None:
    """Were a rank a token behind, the next sums would hang or be of other shapes, and the text another."""
    one, two = pair
    long = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
    stream = two.stream(prompts(1)[0], long)
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    late = two.generate(prompts(3), long, timeout=0.2)
    assert {o.outputs[0].finish_reason for o in late} == {"timeout"}
    assert not two.engine.has_work
    assert (
        two.generate(IDS, GREEDY)[0].outputs[0].text == one.generate(IDS, GREEDY)[0].outputs[0].text
    )
    torch.testing.assert_close(two.logits(IDS), one.logits(IDS), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="do not fit"):
        two.logits(IDS * 25)
    assert (
        two.generate(IDS, GREEDY)[0].outputs[0].text == one.generate(IDS, GREEDY)[0].outputs[0].text
    )


def test_one_group_a_process(pair: tuple[LLM, LLM], folders: Path) -> None:
    with pytest.raises(UsageError, match="process group"):
        LLM(folders / "llama", device="cpu", tensor_parallel=2)
    with pytest.raises(UsageError, match="in parts"):
        LLM.sharing(pair[1], max_num_seqs=2)
