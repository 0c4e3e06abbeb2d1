"""RequestBuilder: prompts, messages and sampling options -> requests that the engine can run."""

from __future__ import annotations

import dataclasses
import functools
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from hayate.config import EnginePlan
from hayate.errors import UsageError
from hayate.models.config import ModelConfig
from hayate.runtime.conversation import (
    Conversation,
    Messages,
    check_preprocessor_config,
    read_conversation,
)
from hayate.runtime.outputs import CompletionOutput
from hayate.runtime.request import Request, RequestImage, Sample
from hayate.runtime.sampling_row import SamplingRow
from hayate.runtime.sequence import ImageSpan
from hayate.runtime.sequence import Sequence as TokenSequence
from hayate.runtime.stopping import StopChecker
from hayate.runtime.structured import GrammarCompiler
from hayate.sampling_params import SamplingParams
from hayate.text.chat_template import ChatTemplate
from hayate.text.detokenizer import IncrementalDetokenizer
from hayate.text.tokenizer import GenerationDefaults, Tokenizer

Prompt = str | Sequence[int] | Conversation
Params = SamplingParams | Sequence[SamplingParams] | None
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the samples of one request have distinct seeds


class RequestBuilder:
    """Makes requests for one model, in any thread.

    folder and tokenizer are None for a model of random weights: its prompts are token ids. Every method raises
    UsageError for what the model or its context cannot take.
    """

    def __init__(self, config: ModelConfig, plan: EnginePlan, folder: Path | None) -> None:
        self.config = config
        self.plan = plan
        self.folder = folder
        self.tokenizer: Tokenizer | None = None
        self.defaults = GenerationDefaults()
        if folder is not None:
            self.tokenizer = Tokenizer(folder)
            self.defaults = GenerationDefaults.from_folder(folder, config.eos_token_ids)
            if config.vision is not None:
                check_preprocessor_config(folder, config.vision)
        self._grammars: GrammarCompiler | None = None  # made when first needed
        self._lock = threading.Lock()

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template. ModelError when it has none, as base models do."""
        if self.folder is None:
            raise UsageError("this model has no tokenizer; give token ids to generate()")
        return ChatTemplate.from_folder(self.folder)

    def of_prompts(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> list[Request]:
        """A request for each prompt (text or token ids); `params` are for all of them, or a list, one a prompt."""
        one_by_one = _prompt_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(one_by_one)
        elif len(params) != len(one_by_one):
            raise UsageError(
                f"{len(params)} sampling params for {len(one_by_one)} prompts; give one for all, or one for each"
            )
        return [
            self.of_prompt(prompt, p, priority=priority, timeout=timeout)
            for prompt, p in zip(one_by_one, params, strict=True)
        ]

    def of_prompt(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> Request:
        """priority: lower runs earlier. timeout: seconds from now, after which the request ends as it is."""
        arrival = time.perf_counter()
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError("this model has no tokenizer; give token ids instead of text")
            prompt = Conversation(prompt, self.tokenizer.encode(prompt))
        elif isinstance(prompt, Iterable):
            prompt = Conversation(None, list(prompt))
        elif not isinstance(prompt, Conversation):
            raise UsageError(f"a prompt is a text or a list of token ids, not {prompt!r}")
        return self._request(prompt, params, arrival, priority, timeout)

    def of_messages(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        max_slices: int | None = None,
    ) -> Request:
        """The next turn of a conversation; messages are {"role": ..., "content": ...}, as `LLM.chat` describes them.

        max_slices: most tiles an image is cut into; default: the checkpoint's. Raises ImageError for an image that
        cannot be read.
        """
        arrival = time.perf_counter()
        conversation = self.read(messages, max_slices=max_slices)
        return self._request(conversation, params, arrival, priority, timeout)

    def read(
        self,
        messages: Messages,
        *,
        max_slices: int | None = None,
        files: bool = True,
        **variables: Any,
    ) -> Conversation:
        """Messages as a prompt: opens their images, so it takes time.

        files: read images from paths; False for messages of strangers. variables: for the chat template.
        """
        template = self.chat_template
        assert self.tokenizer is not None
        return read_conversation(
            messages,
            self.tokenizer,
            template,
            self.config.vision,
            max_len=self.plan.max_model_len,
            max_slices=max_slices,
            files=files,
            **variables,
        )

    def checked_ids(self, ids: list[int]) -> list[int]:
        """`ids` as ints of the vocabulary, at least one."""
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

    def _request(
        self,
        prompt: Conversation,
        params: SamplingParams | None,
        arrival: float,
        priority: int,
        timeout: float | None,
    ) -> Request:
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise UsageError(f"priority must be an integer; it is {priority!r}")
        if timeout is not None and not timeout > 0:
            raise UsageError(f"timeout must be a number of seconds above 0; it is {timeout!r}")
        resolved = (params or SamplingParams()).resolved(self.defaults)
        ids = self.checked_ids(prompt.ids)
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
        images = [RequestImage.of(image) for image in prompt.images]
        spans = [span for image in images for span in image.spans]
        return Request(
            prompt.text,
            ids,
            [self._sample(ids, resolved, seed, i, priority, spans) for i in range(resolved.n)],
            priority=priority,
            deadline=None if timeout is None else arrival + timeout,
            arrival=arrival,
            images=images,
            image_open_time=prompt.open_time,
        )

    def _sample(
        self,
        ids: list[int],
        params: SamplingParams,
        seed: int,
        index: int,
        priority: int,
        spans: Sequence[ImageSpan],
    ) -> Sample:
        sequence = TokenSequence(
            ids,
            params,
            self.plan.max_model_len,
            (seed + index * _SEED_STEP) % 2**63,
            priority=priority,
            spans=spans,
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(self.tokenizer, params.skip_special_tokens)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self.defaults.eos_token_ids)
        matcher = None
        if params.structured is not None:
            matcher = self._grammar_compiler().matcher(params.structured, stop_ids)
        return Sample(
            sequence,
            SamplingRow(
                params,
                sequence.seed,
                # The repetition penalty of such a model is over its output, as its own code does it.
                ids if self.config.vision is None else (),
                sequence.output_ids,
                frozenset(stop_ids),
                matcher=matcher,
            ),
            StopChecker(params, self.defaults.eos_token_ids, detokenizer),
            CompletionOutput(index, logprobs=[] if params.logprobs is not None else None),
        )

    def _grammar_compiler(self) -> GrammarCompiler:
        if self.tokenizer is None:
            raise UsageError(
                "structured output needs a tokenizer, and a model of random weights has none"
            )
        with self._lock:
            if self._grammars is None:
                eos = self.defaults.eos_token_ids
                self._grammars = GrammarCompiler(self.tokenizer, self.config.vocab_size, eos)
            return self._grammars


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Conversation):
        return [prompts]
    if len(prompts) and hasattr(prompts[0], "__index__"):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))
