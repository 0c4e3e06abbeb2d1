"""EngineOptions (what the user said) -> EnginePlan (what will be done): resolved once, frozen, printable.

Nothing here imports torch; the facts of the device come in as numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hayate.errors import OutOfMemory, UsageError

PAGE_SIZE = 64  # tokens a page of the KV cache: one tile of the attention kernels

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPE_NAMES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
}
_DEFAULT_SEQS, _DEFAULT_LEN = 16, 8192  # what the KV cache has room for when nobody says
# Longest part of a prompt beside decoding sequences, which wait for it: some 50 ms on a GPU, 300 ms on a CPU.
_DEFAULT_CHUNK = {"cuda": 2048, "cpu": 128}
_DEFAULT_IMAGE_CACHE = "256M"  # 585 pictures, 37,000 tokens, of width 3,584 in two bytes
# For encoding ten pictures of 1,024 patches, whose widest layers hold 0.4 GB in two bytes.
_IMAGE_WORKSPACE = 512 * 2**20
MAX_DRAFT_TOKENS = 15  # with the token before them, the 16 queries of the decode attention kernel
_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class EngineOptions:
    """What the user asked for; `auto` and None are resolved by `resolve_plan`."""

    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_memory: str | int | None = None  # bytes, "4G", or a share of free memory such as "50%"
    max_num_seqs: int = 256  # sequences computed in one step
    max_num_batched_tokens: int = 8192  # tokens computed in one step
    max_chunk_tokens: int | None = None  # of prompts, in a step in which sequences decode
    prefix_cache: bool = True  # keep the pages of ended sequences for prompts that begin alike
    batch_invariant: bool = False  # a sequence's tokens do not depend on what runs beside it
    speculative: str | None = None  # "ngram", or a draft model: folder, built-in name or hub id
    num_draft_tokens: int = 7  # at most so many guessed tokens are verified at once
    image_cache: str | int | None = None  # bytes of encoded images kept for later prompts
    tensor_parallel: int = 1  # processes, each with its part of every layer, and with its GPU

    @property
    def draft_model(self) -> str | None:
        """The draft model that `speculative` names."""
        return None if self.speculative == "ngram" else self.speculative


@dataclass(frozen=True)
class EnginePlan:
    """What the engine does. Bytes are bytes, lengths are tokens."""

    device: str
    dtype: Dtype
    max_model_len: int
    num_pages: int
    page_size: int
    kv_bytes: int
    weight_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    prefix_cache: bool
    batch_invariant: bool
    speculative: str | None
    num_draft_tokens: int  # 0 without speculation
    image_cache_bytes: int  # 0 where the model takes no images
    tensor_parallel: int = 1  # processes; the bytes above are each one's

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def num_gpus(self) -> int:
        """Devices whose rates add up: 1 on the CPU, which processes share."""
        return 1 if self.device == "cpu" else self.tensor_parallel

    def describe(self) -> str:
        """One line for the log."""
        where = self.device
        if self.tensor_parallel > 1:
            where = f"{self.tensor_parallel} processes from {self.device} on, each"
        return (
            f"{self.dtype} on {where}: weights {format_bytes(self.weight_bytes)}, KV cache "
            f"{format_bytes(self.kv_bytes)} ({self.kv_tokens:,} tokens), context up to {self.max_model_len:,}"
        )


def parse_dtype(text: str) -> str:
    """'auto' or a dtype name from any of its usual spellings. UsageError for others."""
    try:
        return _DTYPE_NAMES[text.lower()]
    except KeyError:
        raise UsageError(
            f"--dtype {text!r} is unknown; use auto, bfloat16, float16 or float32"
        ) from None


def parse_size(text: str | int, *, option: str, free_bytes: int) -> int:
    """Bytes from a number, '4G', '512MiB' or '50%' (of `free_bytes`). UsageError naming `option`."""
    if isinstance(text, int):
        value = float(text)
    elif match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", text):
        value = float(match[1]) / 100 * free_bytes
        if float(match[1]) > 100:
            raise UsageError(f"{option} {text!r} is more than all of the memory")
    elif match := re.fullmatch(
        r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE
    ):
        value = float(match[1]) * _SIZE_UNITS[match[2].upper()]
    else:
        raise UsageError(f"{option} {text!r} is not a size; write bytes, '4G' or '50%'")
    if value <= 0:
        raise UsageError(f"{option} {text!r} must be positive")
    return int(value)


def format_bytes(count: int) -> str:
    """A size for people: binary units, three digits."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def resolve_plan(
    options: EngineOptions,
    *,
    device: str,
    checkpoint_dtype: str,
    weight_bytes_of: dict[str, int],
    kv_bytes_per_token_of: dict[str, int],
    max_position_embeddings: int,
    free_bytes: int,
    supports_bfloat16: bool = True,
    takes_images: bool = False,
) -> EnginePlan:
    """Turn options into a plan, before anything is loaded.

    `weight_bytes_of` and `kv_bytes_per_token_of` give the need for each dtype. Raises OutOfMemory with need,
    have and what would fit when the weights and a minimal cache do not fit in `free_bytes`.
    """
    dtype = parse_dtype(options.dtype)
    if dtype == "auto":
        dtype = checkpoint_dtype
        if dtype == "bfloat16" and not supports_bfloat16:
            dtype = "float16"
    weights, per_token = weight_bytes_of[dtype], kv_bytes_per_token_of[dtype]
    page_bytes = per_token * PAGE_SIZE
    image_cache_bytes = _image_cache_bytes(options, free_bytes) if takes_images else 0
    workspace = weights // 50 + 256 * 2**20 + image_cache_bytes
    if takes_images:
        workspace += _IMAGE_WORKSPACE
    elif options.image_cache is not None:
        raise UsageError(f"--image-cache {options.image_cache}: this model takes no images")
    left = free_bytes - weights - workspace
    if left < page_bytes:
        raise OutOfMemory(
            _too_large(dtype, device, weights + workspace + page_bytes, free_bytes, weight_bytes_of)
        )

    wanted_len = options.max_model_len or max_position_embeddings
    if wanted_len < 1:
        raise UsageError(f"--max-model-len {wanted_len} must be at least 1")
    max_chunk_tokens = _check_batching(options, device)
    if options.kv_memory is not None:
        kv_bytes = parse_size(options.kv_memory, option="--kv-memory", free_bytes=left)
        if kv_bytes > left:
            raise OutOfMemory(
                f"--kv-memory {options.kv_memory} is {format_bytes(kv_bytes)}, but after the weights "
                f"({format_bytes(weights)}) {device} has {format_bytes(left)} free; at most that fits"
            )
    else:
        # Room for one sequence at full length, or for 16 of up to 8,192 tokens; at most half of what
        # is left, unless one sequence needs more.
        one = _round_up(wanted_len)
        some = min(options.max_num_seqs, _DEFAULT_SEQS) * min(one, _DEFAULT_LEN)
        kv_bytes = min(left // 2, max(one, some) * per_token)
        kv_bytes = max(kv_bytes, min(left, one * per_token))
    num_pages = kv_bytes // page_bytes
    if num_pages < 1:
        raise OutOfMemory(
            f"--kv-memory {options.kv_memory} holds no page; one page of {PAGE_SIZE} tokens takes "
            f"{format_bytes(page_bytes)}"
        )
    if options.max_model_len and num_pages * PAGE_SIZE < options.max_model_len:
        raise OutOfMemory(
            f"a context of {options.max_model_len} tokens needs {format_bytes(options.max_model_len * per_token)} "
            f"of KV cache; {format_bytes(kv_bytes)} is available, which holds {num_pages * PAGE_SIZE} tokens"
        )
    return EnginePlan(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=min(wanted_len, num_pages * PAGE_SIZE),
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        kv_bytes=num_pages * page_bytes,
        weight_bytes=weights,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_chunk_tokens=max_chunk_tokens,
        prefix_cache=options.prefix_cache,
        batch_invariant=options.batch_invariant,
        speculative=options.speculative,
        num_draft_tokens=options.num_draft_tokens if options.speculative else 0,
        image_cache_bytes=image_cache_bytes,
        tensor_parallel=options.tensor_parallel,
    )


def _check_batching(options: EngineOptions, device: str) -> int:
    """UsageError unless the options of the scheduler make sense; returns `max_chunk_tokens`, resolved."""
    budget, chunk = options.max_num_batched_tokens, options.max_chunk_tokens
    if options.max_num_seqs < 1:
        raise UsageError(f"--max-num-seqs {options.max_num_seqs} must be at least 1")
    if budget < PAGE_SIZE:
        raise UsageError(
            f"--max-num-batched-tokens {budget} must be at least {PAGE_SIZE}, one page of the KV cache"
        )
    if chunk is None:
        chunk = min(_DEFAULT_CHUNK[device.partition(":")[0]], budget)
    if not PAGE_SIZE <= chunk <= budget:
        raise UsageError(
            f"--max-chunk-tokens {chunk} must be at least {PAGE_SIZE}, one page of the KV cache, and at most "
            f"--max-num-batched-tokens, which is {budget}"
        )
    if options.speculative == "":
        raise UsageError(
            "--speculative is empty; give ngram, or the folder or name of a draft model"
        )
    _check_parallel(options)
    if not 1 <= options.num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise UsageError(
            f"--num-draft-tokens {options.num_draft_tokens} must be between 1 and {MAX_DRAFT_TOKENS}"
        )
    return chunk


def _check_parallel(options: EngineOptions) -> None:
    """UsageError for what several processes cannot do alike."""
    if options.tensor_parallel == 1:
        return
    if options.speculative is not None:
        raise UsageError(
            f"--speculative {options.speculative} needs --tensor-parallel 1: when drafts pay is decided by measured "
            "times, which differ from process to process"
        )
    if options.batch_invariant:
        raise UsageError(
            "--batch-invariant needs --tensor-parallel 1: the order of a sum over processes depends on its size"
        )


def _image_cache_bytes(options: EngineOptions, free_bytes: int) -> int:
    size = _DEFAULT_IMAGE_CACHE if options.image_cache is None else options.image_cache
    return parse_size(size, option="--image-cache", free_bytes=free_bytes)


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE) * PAGE_SIZE


def _too_large(
    dtype: str, device: str, need: int, have: int, weight_bytes_of: dict[str, int]
) -> str:
    fits = [d for d, b in weight_bytes_of.items() if d != dtype and b * 1.02 + 2**28 < have]
    advice = (
        f"; --dtype {fits[0]} would fit" if fits else "; a smaller or quantised model would fit"
    )
    return f"the model needs {format_bytes(need)} in {dtype}, but {device} has {format_bytes(have)} free{advice}"
