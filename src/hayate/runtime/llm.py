"""LLM: a checkpoint folder in, text out."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from hayate.checkpoint.hub import resolve_model
from hayate.checkpoint.index import Checkpoint
from hayate.checkpoint.placements import check_placements
from hayate.checkpoint.reader import LoadReport, load
from hayate.config import DTYPE_BYTES, EngineOptions, EnginePlan, resolve_plan
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM, build_model, init_random
from hayate.models.families import load_config
from hayate.models.presets import preset_config
from hayate.models.weights import IGNORED_TENSORS, placements
from hayate.runtime import device as devices
from hayate.runtime.engine import Engine
from hayate.runtime.outputs import CompletionOutput, RequestOutput, StreamChunk
from hayate.runtime.request import Request, Sample
from hayate.runtime.sampler import SamplingRow
from hayate.runtime.sequence import Sequence as TokenSequence
from hayate.runtime.stopping import StopChecker
from hayate.sampling_params import SamplingParams
from hayate.text.chat_template import ChatTemplate
from hayate.text.detokenizer import IncrementalDetokenizer
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[dict[str, Any]]
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the samples of one request have distinct seeds


class LLM:
    """A model ready to generate.

    Args:
        model: a checkpoint folder, a built-in name, or a hub id `org/name`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `N`.
        dtype: of weights, activations and cache; `auto` is the checkpoint's own.
        max_model_len: longest prompt and output together, in tokens; default: as config.json says, if it fits.
        kv_memory: bytes, "4G", or "50%" of what is free after the weights; default: room for one sequence at
            full length, or for 16 of up to 8,192 tokens, and at most half of what is free.
        revision: branch, tag or commit of a hub id.
        progress: called with (bytes read, bytes in all) while loading.

    Raises ModelError, DeviceError, OutOfMemory (before anything is loaded, where it can be computed), UsageError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_memory: str | int | None = None,
        max_num_seqs: int = 256,
        revision: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        target = devices.resolve_device(device)
        folder = resolve_model(model, revision)
        config = load_config(folder)
        checkpoint = Checkpoint.open(folder)
        if config.tie_embeddings and "lm_head.weight" in checkpoint.tensors:
            config = dataclasses.replace(
                config, tie_embeddings=False
            )  # the file has a head: use it
        self.folder: Path | None = folder
        self.tokenizer: Tokenizer | None = Tokenizer(folder)
        self.defaults = GenerationDefaults.from_folder(folder, config.eos_token_ids)
        options = EngineOptions(
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            max_num_seqs=max_num_seqs,
        )
        plan = make_plan(config, options, target)
        torch_dtype = getattr(torch, plan.dtype)
        with torch.device("meta"):
            shapes = dict(CausalLM(config, dtype=torch_dtype).named_parameters())
        placed = placements(config)
        check_placements(checkpoint, shapes, placed, IGNORED_TENSORS)
        with devices.device_errors(target, doing="loading"):
            network = build_model(config, device=target, dtype=torch_dtype)
            self.load_report: LoadReport | None = load(
                checkpoint,
                dict(network.named_parameters()),
                placed,
                ignore=IGNORED_TENSORS,
                progress=progress,
            )
            self._start(config, plan, network)

    @classmethod
    def from_random(
        cls,
        preset: str | ModelConfig,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_memory: str | int | None = None,
        max_num_seqs: int = 256,
        seed: int = 0,
    ) -> LLM:
        """A full-size architecture with random weights and no tokenizer: prompts are token ids. For benchmarks."""
        target = devices.resolve_device(device)
        config = preset if isinstance(preset, ModelConfig) else preset_config(preset)
        options = EngineOptions(device, dtype, max_model_len, kv_memory, max_num_seqs)
        plan = make_plan(config, options, target)
        self = cls.__new__(cls)
        self.folder = self.tokenizer = self.load_report = None
        self.defaults = GenerationDefaults()
        with devices.device_errors(target, doing="drawing the weights"):
            network = build_model(config, device=target, dtype=getattr(torch, plan.dtype))
            init_random(network, seed)
            self._start(config, plan, network)
        return self

    def _start(self, config: ModelConfig, plan: EnginePlan, network: CausalLM) -> None:
        self.config = config
        self.plan = plan
        self.engine = Engine(network, plan)

    @property
    def device(self) -> torch.device:
        return self.engine.runner.device

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template. ModelError when it has none, as base models do."""
        assert self.folder is not None
        return ChatTemplate.from_folder(self.folder)

    def peak_memory_bytes(self) -> dict[str, int]:
        """Largest memory use so far: `host`, and on a GPU `device`."""
        return devices.peak_memory_bytes(self.device)

    # -- generating -------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids); results in the order of the prompts."""
        requests = [self._request(p, params) for p in self._prompt_list(prompts)]
        return self._run(requests)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """Complete one prompt, piece by piece; closing the iterator early ends the work."""
        return self._stream(self._request(prompt, params))

    def chat(self, messages: Messages, params: SamplingParams | None = None) -> list[RequestOutput]:
        """Answer a conversation: messages are {"role": ..., "content": ...}."""
        return self._run([self._chat_request(messages, params)])

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None
    ) -> Iterator[StreamChunk]:
        """`chat`, piece by piece."""
        return self._stream(self._chat_request(messages, params))

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits (T, V) float32 on the CPU: row t is the model's prediction after token t."""
        sequence = TokenSequence(
            self._checked_ids(list(token_ids)),
            SamplingParams(temperature=0),
            self.plan.max_model_len,
            0,
        )
        engine = self.engine
        if not engine.pages.extend(sequence, sequence.num_tokens):
            raise UsageError(
                f"{sequence.num_tokens} tokens do not fit the free part of the KV cache; raise kv_memory"
            )
        try:
            with devices.device_errors(self.device, doing="running"):
                return engine.runner.all_logits(sequence).float().cpu()
        finally:
            engine.pages.release(sequence)

    def _run(self, requests: list[Request]) -> list[RequestOutput]:
        try:
            for request in requests:
                self.engine.submit(request)
            while not all(r.finished for r in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.abort(request)
        return [r.result() for r in requests]

    def _stream(self, request: Request) -> Iterator[StreamChunk]:
        yield from self.engine.run(request)

    # -- requests ---------------------------------------------------------------------------------

    def _prompt_list(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str):
            return [prompts]
        if len(prompts) and hasattr(prompts[0], "__index__"):
            return [cast(Prompt, prompts)]
        return list(cast(Sequence[Prompt], prompts))

    def _chat_request(self, messages: Messages, params: SamplingParams | None) -> Request:
        if self.folder is None or self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give token ids to generate()")
        text = self.chat_template.render(messages, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self._request_of(text, ids, params)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        if not isinstance(prompt, str):
            if not isinstance(prompt, Iterable):
                raise UsageError(f"a prompt is a text or a list of token ids, not {prompt!r}")
            return self._request_of(None, list(prompt), params)
        if self.tokenizer is None:
            raise UsageError("this model has no tokenizer; give token ids instead of text")
        return self._request_of(prompt, self.tokenizer.encode(prompt), params)

    def _request_of(
        self, text: str | None, ids: list[int], params: SamplingParams | None
    ) -> Request:
        arrival = time.perf_counter()
        resolved = (params or SamplingParams()).resolved(self.defaults)
        ids = self._checked_ids(ids)
        limit = self.plan.max_model_len
        if len(ids) >= limit:
            raise UsageError(
                f"the prompt has {len(ids)} tokens and the context holds {limit}, one of which is for the answer; "
                "shorten the prompt or raise --max-model-len"
            )
        resolved.check_vocabulary(self.config.vocab_size)
        room = limit - len(ids)
        resolved = dataclasses.replace(resolved, max_tokens=min(resolved.max_tokens or room, room))
        seed = resolved.seed if resolved.seed is not None else secrets.randbits(63)
        samples = [self._sample(ids, resolved, seed, i) for i in range(resolved.n)]
        return Request(text, ids, samples, arrival=arrival)

    def _sample(self, ids: list[int], params: SamplingParams, seed: int, index: int) -> Sample:
        sequence = TokenSequence(
            ids, params, self.plan.max_model_len, (seed + index * _SEED_STEP) % 2**63
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(self.tokenizer, params.skip_special_tokens)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.defaults.eos_token_ids)
        return Sample(
            sequence,
            SamplingRow(params, sequence.seed, ids, sequence.output_ids, frozenset(stop_ids)),
            StopChecker(params, self.defaults.eos_token_ids, detokenizer),
            CompletionOutput(index, logprobs=[] if params.logprobs is not None else None),
        )

    def _checked_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UsageError(
                "the prompt is empty: it has no tokens, not even one that begins a text"
            )
        if odd := [i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__")]:
            raise UsageError(f"a prompt of token ids holds {odd[0]!r}, which is not an integer")
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise UsageError(
                f"token id {bad[0]} is outside the vocabulary (0 to {self.config.vocab_size - 1})"
            )
        return ids


def make_plan(config: ModelConfig, options: EngineOptions, device: torch.device) -> EnginePlan:
    """Resolve `options` for `config` on `device` (see `config.resolve_plan`)."""
    return resolve_plan(
        options,
        device=str(device),
        checkpoint_dtype=config.dtype,
        weight_bytes_of={d: config.num_parameters * b for d, b in DTYPE_BYTES.items()},
        kv_bytes_per_token_of={d: config.kv_bytes_per_token(b) for d, b in DTYPE_BYTES.items()},
        max_position_embeddings=config.max_position_embeddings,
        free_bytes=devices.free_bytes(device),
        supports_bfloat16=devices.supports_bfloat16(device),
    )
