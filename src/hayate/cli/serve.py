"""`hayate serve`: a model behind an HTTP server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hayate.cli import options
from hayate.config import parse_dtype, parse_size
from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.runtime.async_llm import AsyncLLM

KEY_VARIABLE = "HAYATE_API_KEY"
_SERVER = "Server"


def _server(*names: str, help: str, metavar: str | None = None, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=_SERVER, **kwargs)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder, hub id org/name, or smollm2-135m."),
    ] = None,
    model_option: Annotated[
        str | None, typer.Option("--model", "-m", metavar="DIR|NAME", help="The same.")
    ] = None,
    host: Annotated[str, _server(help="Address to listen at.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[int, _server(help="0 is any free one.", metavar="N")] = 8000,
    api_key: Annotated[
        list[str] | None,
        _server(
            help="A key that clients must send; repeatable. Others see it in `ps`.", metavar="KEY"
        ),
    ] = None,
    api_key_file: Annotated[
        str | None, _server(help="A file of keys, one a line.", metavar="FILE")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, _server(help="Default: the folder's name; repeatable.", metavar="NAME")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        _server(help="Web pages that may call (CORS); * is all; repeatable.", metavar="URL"),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, _server(help="Further Host header to answer; repeatable.", metavar="HOST")
    ] = None,
    max_body_size: Annotated[str, _server(help="Of one request.", metavar="SIZE")] = "8M",
    max_requests: Annotated[
        int, _server(help="Answered or waiting at once; others get 429.", metavar="N", min=1)
    ] = 1024,
    max_samples: Annotated[
        int, _server(help="Of one request: prompts times n.", metavar="N", min=1)
    ] = 128,
    fetch_images: Annotated[
        bool, _server("--fetch-images", help="Fetch images that clients name by http(s) URLs.")
    ] = False,
    max_images: Annotated[int, _server(help="Of one request.", metavar="N", min=1)] = 16,
    max_pixels: Annotated[
        int, _server(help="Of all images of one request.", metavar="N", min=1)
    ] = 64 * 2**20,
    max_open_pixels: Annotated[
        int, _server(help="Of all requests being answered; others get 429.", metavar="N", min=1)
    ] = 512 * 2**20,
    drain_timeout: Annotated[
        float, _server(help="For running requests after Ctrl-C, in seconds.", metavar="S", min=0)
    ] = 60.0,
    json_logs: Annotated[bool, _server("--json-logs", help="Log lines are JSON objects.")] = False,
    log_prompts: Annotated[
        bool, _server("--log-prompts", help="Prompts and answers in the log.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    max_chunk_tokens: options.MaxChunkTokens = None,
    prefix_cache: options.PrefixCache = True,
    batch_invariant: options.BatchInvariant = False,
    speculative: options.Speculative = None,
    num_draft_tokens: options.NumDraftTokens = None,
    image_cache: Annotated[
        str | None, typer.Option(help="For encoded images, kept for later prompts.", metavar="SIZE")
    ] = None,
    tensor_parallel: options.TensorParallel = None,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's protocols (docs/serving.md).

    Ctrl-C once lets running requests finish, twice stops at once.
    """
    name = _one_model(model, model_option)
    engine: dict[str, Any] = {
        "max_model_len": max_model_len,
        "kv_memory": kv_memory,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_chunk_tokens": max_chunk_tokens,
        "prefix_cache": prefix_cache,
        "batch_invariant": batch_invariant,
        "speculative": speculative,
        "num_draft_tokens": num_draft_tokens,
        "image_cache": image_cache,
        "tensor_parallel": tensor_parallel,
        "revision": revision,
        "device": options.checked_device(device),
        "dtype": parse_dtype(dtype),
    }
    options.check_speculation(engine)
    from hayate.server.options import ServerOptions

    own_name = Path(name).resolve().name if Path(name).is_dir() else name
    server_options = ServerOptions(
        host=host,
        port=port,
        served_model_names=tuple(served_model_name or (own_name,)),
        api_keys=_api_keys(api_key, api_key_file),
        allowed_origins=tuple(allowed_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        max_body_bytes=parse_size(max_body_size, option="--max-body-size", free_bytes=0),
        max_requests=max_requests,
        max_samples=max_samples,
        fetch_images=fetch_images,
        max_images=max_images,
        max_pixels=max_pixels,
        max_open_pixels=max_open_pixels,
        drain_timeout=drain_timeout,
        json_logs=json_logs,
        log_prompts=log_prompts,
    )

    def load(progress: Callable[[int, int], None]) -> AsyncLLM:
        from hayate.runtime.async_llm import AsyncLLM

        return AsyncLLM(name, progress=progress, **options.given(engine))

    from hayate.server.run import serve as run

    run(load, server_options, verbose=verbose)


def _one_model(argument: str | None, option: str | None) -> str:
    if (argument is None) == (option is None):
        raise UsageError("name the model once: hayate serve MODEL")
    return argument or option or ""


def _api_keys(given: list[str] | None, file: str | None) -> tuple[str, ...]:
    """Keys of the command line, of the file and of the environment, together."""
    keys = list(given or ())
    if file is not None:
        lines = options.read_text(file, "--api-key-file").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"--api-key-file {file} has no key in it")
        keys += found
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    return tuple(keys)
