"""LoadedModel: a model, what makes its requests, and the engine that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from hayate.checkpoint.hub import resolve_model
from hayate.checkpoint.reader import LoadReport
from hayate.config import EngineOptions, EnginePlan
from hayate.errors import HayateError, UsageError
from hayate.models.config import ModelConfig
from hayate.models.decoder import CausalLM
from hayate.models.presets import preset_config
from hayate.runtime import device as devices
from hayate.runtime.draft_model import open_draft
from hayate.runtime.engine import Engine
from hayate.runtime.engine_stats import EngineStats
from hayate.runtime.loading import load_network, make_plan, open_checkpoint, random_network
from hayate.runtime.ranks import Ranks
from hayate.runtime.request_builder import RequestBuilder
from hayate.runtime.tensor_parallel import Source, TensorParallelEngine
from hayate.text.chat_template import ChatTemplate
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

_Self = TypeVar("_Self", bound="LoadedModel")


class LoadedModel:
    """What `LLM` and `AsyncLLM` have in common: a model ready to generate.

    Args:
        model: a checkpoint folder, a built-in name, or a hub id `org/name`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `N`.
        dtype: of weights, activations and cache; `auto` is the checkpoint's own.
        max_model_len: longest prompt and output together, in tokens; default: as config.json says, if it fits.
        kv_memory: bytes, "4G", or "50%" of what is free after the weights; default: room for one sequence at
            full length, or for 16 of up to 8,192 tokens, and at most half of what is free.
        max_num_seqs: sequences computed in one step; others wait.
        max_num_batched_tokens: tokens computed in one step, prompts included.
        max_chunk_tokens: tokens of prompts computed in a step in which other sequences decode: it bounds how long
            these wait for a prompt. Default: 2,048 on a GPU, 128 on the CPU.
        prefix_cache: keep the keys and values of ended sequences, for prompts that begin with the same tokens.
        batch_invariant: a sequence's tokens do not depend, to the last bit, on what runs beside it. Slower.
        speculative: `ngram` (guesses from the text so far) or a draft model (folder, built-in name or hub id);
            the tokens are the same without. A draft model guesses nothing where the prompt shows images. Default: none.
        num_draft_tokens: at most so many guessed tokens are verified at once.
        image_cache: bytes (or "512M") of encoded images, those of running requests and those kept for prompts that
            show them again; only for models that take images. Default: 256 MiB.
        tensor_parallel: processes that share the model, each with a part of every layer and a GPU of its own (the
            one named and those after it), or on the CPU its share of the cores. `kv_memory` is then each one's.
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
        max_num_batched_tokens: int = 8192,
        max_chunk_tokens: int | None = None,
        prefix_cache: bool = True,
        batch_invariant: bool = False,
        speculative: str | None = None,
        num_draft_tokens: int = 7,
        image_cache: str | int | None = None,
        tensor_parallel: int = 1,
        revision: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        options = EngineOptions(
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_chunk_tokens=max_chunk_tokens,
            prefix_cache=prefix_cache,
            batch_invariant=batch_invariant,
            speculative=speculative,
            num_draft_tokens=num_draft_tokens,
            image_cache=image_cache,
            tensor_parallel=tensor_parallel,
        )
        target = devices.resolve_device(device)
        folder = resolve_model(model, revision)
        config, checkpoint = open_checkpoint(folder)
        if tensor_parallel != 1:
            self._start_parallel(options, target, Source(config, folder), progress)
            return
        draft = draft_model = None
        if options.draft_model is not None:
            draft, draft_checkpoint = open_draft(options.draft_model, config, Tokenizer(folder))
        plan = make_plan(config, options, target, draft=draft)
        requests = RequestBuilder(config, plan, folder)
        network, report = load_network(config, checkpoint, plan, progress)
        if draft is not None:
            draft_model, _ = load_network(draft, draft_checkpoint, plan)
        self._start(options, network, requests, report, draft_model)

    @classmethod
    def from_random(
        cls: type[_Self], preset: str | ModelConfig, *, seed: int = 0, **options: Any
    ) -> _Self:
        """A full-size architecture with random weights and no tokenizer: prompts are token ids. For benchmarks.

        options: those of the constructor, except `revision` and `progress`.
        """
        config = preset if isinstance(preset, ModelConfig) else preset_config(preset)
        wanted = EngineOptions(**options)
        if wanted.draft_model is not None:
            raise UsageError(
                f"--speculative {wanted.draft_model}: a model of random weights has no draft model; use ngram"
            )
        target = devices.resolve_device(wanted.device)
        self = cls.__new__(cls)
        if wanted.tensor_parallel != 1:
            self._start_parallel(wanted, target, Source(config, None, seed))
            return self
        plan = make_plan(config, wanted, target)
        network = random_network(config, plan, seed)
        self._start(wanted, network, RequestBuilder(config, plan, None), None)
        return self

    @classmethod
    def sharing(cls: type[_Self], other: LoadedModel, **changes: Any) -> _Self:
        """The weights of `other` under an engine of its own, with its own KV cache and some options changed."""
        config = other.config
        wanted = dataclasses.replace(other.options, **changes)
        if wanted.tensor_parallel != 1 or other.options.tensor_parallel != 1:
            raise UsageError(
                f"--tensor-parallel {wanted.tensor_parallel}: engines cannot share weights that are in parts"
            )
        draft_model = other.draft_model if wanted.draft_model is not None else None
        if wanted.draft_model not in (None, other.options.draft_model):
            raise UsageError(f"--speculative {wanted.draft_model}: this draft model is not loaded")
        draft = draft_model.config if draft_model is not None else None
        reserved = other.plan.weight_bytes
        plan = make_plan(config, wanted, other.device, draft=draft, reserved=reserved)
        self = cls.__new__(cls)
        requests = RequestBuilder(config, plan, other.folder)
        self._start(wanted, other.engine.runner.model, requests, other.load_report, draft_model)
        return self

    def _start(
        self,
        options: EngineOptions,
        network: CausalLM,
        requests: RequestBuilder,
        report: LoadReport | None,
        draft_model: CausalLM | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.options = options
        self.draft_model = draft_model
        self.plan: EnginePlan = requests.plan
        self.config: ModelConfig = requests.config
        self.requests = requests
        self.load_report = report  # None for random weights
        with devices.device_errors(torch.device(self.plan.device), doing="loading"):
            if ranks is None:
                self.engine = Engine(network, self.plan, draft_model)
            else:
                self.engine = TensorParallelEngine(network, self.plan, ranks)

    def _start_parallel(
        self,
        options: EngineOptions,
        device: torch.device,
        source: Source,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        make_plan(source.config, options, device)  # to refuse what can be before anything starts
        ranks = Ranks(options.tensor_parallel, device)
        try:
            with ranks.working():
                plan = make_plan(source.config, options, device, free_bytes=ranks.free_bytes)
                requests = RequestBuilder(source.config, plan, source.folder)
                ranks.send("load", source, plan)
                try:
                    network, report = source.load(plan, progress)
                except HayateError:
                    raise
                except Exception as error:
                    raise ranks.explain(error) from error
                self._start(options, network, requests, report, None, ranks)
                ranks.wait_for("loaded")
        except BaseException:
            ranks.close()
            raise

    @property
    def folder(self) -> Path | None:
        """The checkpoint; None for random weights."""
        return self.requests.folder

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.requests.tokenizer

    @property
    def defaults(self) -> GenerationDefaults:
        """The sampling options that the checkpoint recommends."""
        return self.requests.defaults

    @property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template. ModelError when it has none, as base models do."""
        return self.requests.chat_template

    @property
    def device(self) -> torch.device:
        return self.engine.runner.device

    def stats(self) -> EngineStats:
        """What the engine does and has done; from any thread, at any time."""
        return self.engine.stats

    def peak_memory_bytes(self) -> dict[str, int]:
        """Largest memory use so far: `host`, and on a GPU `device`."""
        return devices.peak_memory_bytes(self.device)
