"""`hayate generate`: one prompt in, its continuation out."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hayate.cli import options
from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.runtime.llm import LLM
    from hayate.runtime.outputs import RequestOutput
    from hayate.sampling_params import SamplingParams

Query = str | list[dict[str, str]]  # a raw prompt, or messages for the chat template


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Read the prompt from a UTF-8 file; - is stdin."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Wrap the prompt in the model's chat template, or not."),
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt (with --chat).")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="At most N new tokens.")
    ] = 100,
    samples: Annotated[
        int, typer.Option("--n", metavar="N", help="Samples of the same prompt.")
    ] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the text as it is generated.")
    ] = True,
    logprobs: Annotated[
        int | None,
        typer.Option(metavar="K", help="Log-probabilities of the K best (with --json)."),
    ] = None,
    as_json: options.Json = False,
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
    json_object: options.JsonObject = False,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    choice: options.Choice = None,
    grammar: options.Grammar = None,
) -> None:
    """Continue a prompt: text on standard output, figures on standard error.

    The prompt goes to the model as it is, unless --chat makes it a message.
    """
    from hayate.sampling_params import SamplingParams

    if logprobs is not None and not as_json:
        raise UsageError("--logprobs are printed by --json only; add --json")
    if system is not None and not chat:
        raise UsageError("--system needs --chat: a raw prompt has no system message")
    text = _read_prompt(prompt, prompt_file)
    params = SamplingParams(
        n=samples,
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
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        skip_special_tokens=not keep_special_tokens,
        structured=options.parse_structured(json_object, json_schema, regex, choice, grammar),
    )
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
    query: Query = _messages(text, system) if chat else text
    if stream and samples == 1 and not as_json:
        output = _print_stream(llm, query, params)
    else:
        run = llm.generate(query, params) if isinstance(query, str) else llm.chat(query, params)
        output = run[0]
        print(_as_json(llm, output) if as_json else _as_text(output), flush=True)
    if not as_json:
        _print_figures(llm, output)


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("give the prompt by either --prompt TEXT or --prompt-file FILE")
    if prompt is not None:
        return options.checked_text(prompt, "--prompt")
    assert prompt_file is not None
    return options.read_text(prompt_file, "--prompt-file")


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": text}]
    if system is not None:
        content = options.checked_text(system, "--system")
        messages.insert(0, {"role": "system", "content": content})
    return messages


def _print_stream(llm: LLM, query: Query, params: SamplingParams) -> RequestOutput:
    chunks = llm.stream(query, params) if isinstance(query, str) else llm.stream_chat(query, params)
    output = None
    for chunk in chunks:
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        output = chunk.request or output
    print(flush=True)
    assert output is not None
    return output


def _as_text(output: RequestOutput) -> str:
    if len(output.outputs) == 1:
        return output.outputs[0].text
    return "\n".join(f"--- sample {o.index + 1} ---\n{o.text}" for o in output.outputs)


def _as_json(llm: LLM, output: RequestOutput) -> str:
    from hayate.cli import figures

    report = {
        "device": str(llm.device),
        "dtype": llm.plan.dtype,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [dataclasses.asdict(sample) for sample in output.outputs],
        "figures": figures.collect(llm, output.metrics),
    }
    return json.dumps(report, ensure_ascii=False)


def _print_figures(llm: LLM, output: RequestOutput) -> None:
    from hayate.cli import figures

    print(f"\n{figures.block(figures.collect(llm, output.metrics))}", file=sys.stderr, flush=True)
