"""`hayate chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hayate.cli import options
from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.runtime.llm import LLM
    from hayate.runtime.outputs import StreamChunk
    from hayate.sampling_params import SamplingParams

HELP = (
    "/reset forgets the conversation · /system TEXT sets the system prompt and forgets · "
    "/exit or Ctrl-D ends · Ctrl-C stops an answer"
)


def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-n", metavar="N", help="Longest answer, in tokens."),
    ] = 1024,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    prefix_cache: options.PrefixCache = True,
    batch_invariant: options.BatchInvariant = False,
    speculative: options.Speculative = None,
    num_draft_tokens: options.NumDraftTokens = None,
    tensor_parallel: options.TensorParallel = None,
    verbose: options.Verbose = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    stop_token_id: options.StopTokenId = None,
    min_tokens: options.MinTokens = 0,
    ignore_eos: options.IgnoreEos = False,
    keep_special_tokens: options.KeepSpecial = False,
) -> None:
    """Talk with a model. In the conversation, /help lists the commands.

    Answers go to standard output, the rest to standard error. Each line of a pipe is a message.
    """
    from hayate.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=options.parse_logit_bias(logit_bias),
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        skip_special_tokens=not keep_special_tokens,
    )
    if system is not None:
        system = options.checked_text(system, "--system")
    llm = options.open_llm(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        kv_memory=kv_memory,
        verbose=verbose,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_cache=prefix_cache,
        batch_invariant=batch_invariant,
        speculative=speculative,
        num_draft_tokens=num_draft_tokens,
        tensor_parallel=tensor_parallel,
    )
    Conversation(llm, params, system, show_rate=verbose).run(_lines())


class Conversation:
    """The messages so far, and what a line from the user does with them."""

    def __init__(
        self, llm: LLM, params: SamplingParams, system: str | None, show_rate: bool = False
    ) -> None:
        self.llm = llm
        self.params = params
        self.show_rate = show_rate
        self.messages: list[dict[str, str]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Forget everything but the system prompt."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self, lines: Iterator[str]) -> None:
        """Answer every line until the input or the user ends."""
        for line in lines:
            text = line.strip()
            if text in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name == "/reset":
            self.reset(self.system)
        elif name == "/system":
            self.reset(argument.strip() or None)
        elif name == "/help":
            _note(HELP)
        else:
            _note(f"{name} is no command; {HELP}")

    def _answer(self, text: str) -> None:
        """Stream the answer; Ctrl-C ends it early and keeps what was said."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        request = None
        try:
            chunks = cast(
                "Generator[StreamChunk]", self.llm.stream_chat(self.messages, self.params)
            )
            with closing(chunks):  # which ends the request in the engine, come what may
                for chunk in chunks:
                    pieces.append(chunk.text)
                    request = chunk.request or request
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            _note(" [stopped]")
        except UsageError as error:  # the conversation has outgrown the context
            self.messages.pop()
            _note(f"{error}; /reset starts anew")
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if self.show_rate and request is not None:
            metrics = request.metrics
            _note(
                f"{metrics.num_generated_tokens} tokens, "
                f"{metrics.decode_tokens_per_second:.1f} tokens/s"
            )


def _lines() -> Iterator[str]:
    """Lines from the user: prompted for and editable in a terminal, as they come from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  # gives input() editing and history

    _note(HELP)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
