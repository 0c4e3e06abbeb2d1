"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hayate.config import parse_dtype
from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.runtime.llm import LLM
    from hayate.sampling_params import StructuredOutput

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="DIR|NAME", help="Folder, hub id org/name, or smollm2-135m."
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="REV")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or N.", metavar="DEVICE")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.", metavar="DTYPE")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest context, in tokens.", metavar="N", min=1)
]
KvMemory = Annotated[
    str | None, typer.Option(help="Memory of the KV cache: bytes, 4G or 50%.", metavar="SIZE")
]
MaxNumSeqs = Annotated[
    int | None, typer.Option(help="Sequences computed in one step.", metavar="N", min=1)
]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(help="Tokens computed in one step.", metavar="N", min=1)
]
MaxChunkTokens = Annotated[
    int | None,
    typer.Option(help="Longest part of a prompt beside decoding sequences.", metavar="N", min=1),
]
PrefixCache = Annotated[
    bool,
    typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse what prompts have in common."),
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="Same bits whatever runs beside it; slower."),
]
Speculative = Annotated[
    str | None, typer.Option(help="ngram, or a draft model: folder or name.", metavar="NAME")
]
NumDraftTokens = Annotated[
    int | None, typer.Option(help="Tokens guessed and verified at once.", metavar="N", min=1)
]
TensorParallel = Annotated[
    int | None,
    typer.Option(help="GPUs that share the model, from the device on.", metavar="N", min=1),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the plan; tracebacks on errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _sampling(*names: str, help: str, metavar: str | None = None, **kwargs: Any) -> Any:
    panel = "Sampling (default: the model's generation_config.json, else greedy)"
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **kwargs)


Temperature = Annotated[float | None, _sampling(help="0 is greedy.", metavar="T")]
TopP = Annotated[float | None, _sampling(help="Smallest set with this probability.", metavar="P")]
TopK = Annotated[int | None, _sampling(help="The K most likely tokens; 0 is off.", metavar="K")]
MinP = Annotated[
    float | None, _sampling(help="At least P times the best probability.", metavar="P")
]
RepetitionPenalty = Annotated[float | None, _sampling(help="1 is off.", metavar="X")]
PresencePenalty = Annotated[float, _sampling(help="Subtracted once for a token used.", metavar="X")]
FrequencyPenalty = Annotated[float, _sampling(help="Subtracted for each use.", metavar="X")]
LogitBias = Annotated[
    list[str] | None, _sampling(help="Added to a token's logit; repeatable.", metavar="ID=X")
]
Seed = Annotated[int | None, _sampling(help="Same seed, same text.", metavar="N")]
Stop = Annotated[
    list[str] | None, _sampling(help="End before this text; repeatable.", metavar="TEXT")
]
StopTokenId = Annotated[
    list[int] | None, _sampling(help="End at this token; repeatable.", metavar="ID")
]
MinTokens = Annotated[int, _sampling(help="No end before this many tokens.", metavar="N")]
IgnoreEos = Annotated[bool, _sampling("--ignore-eos", help="Go on after the end token.")]
KeepSpecial = Annotated[
    bool, _sampling("--keep-special-tokens", help="Show special tokens in the text.")
]


def _structured(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Structured output")


JsonObject = Annotated[bool, _structured("--json-object", help="A JSON object.")]
JsonSchema = Annotated[
    str | None, _structured(help="JSON valid under a schema.", metavar="FILE|TEXT")
]
Regex = Annotated[
    str | None, _structured(help="Text that matches from start to end.", metavar="REGEX")
]
Choice = Annotated[
    list[str] | None, _structured(help="One of these texts; repeatable.", metavar="TEXT")
]
Grammar = Annotated[
    str | None, _structured(help="Text of a Lark grammar's rule `start`.", metavar="FILE")
]


def checked_device(text: str) -> str:
    """`text` as auto, cpu, cuda or cuda:N (from a bare N too); nobody looks yet if it exists."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        return text
    if text.isdecimal():
        return f"cuda:{int(text)}"
    raise UsageError(f"--device {text!r} is unknown; use auto, cpu, cuda, cuda:N or N")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def check_speculation(options: dict[str, Any]) -> None:
    """UsageError for draft tokens without anything that drafts them."""
    if options.get("num_draft_tokens") is not None and options.get("speculative") is None:
        raise UsageError("--num-draft-tokens needs --speculative: nothing else guesses tokens")


def parse_logit_bias(entries: list[str] | None) -> dict[int, float] | None:
    """['15=-2.5', ...] -> {15: -2.5, ...}."""
    if not entries:
        return None
    bias = {}
    for entry in entries:
        match = re.fullmatch(r"\s*(\d+)\s*[=:]\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*", entry)
        try:
            bias[int(match[1])] = float(match[2])  # type: ignore[index]
        except (TypeError, ValueError):
            raise UsageError(
                f"--logit-bias {entry!r} is not TOKEN_ID=NUMBER, for example 15=-2.5"
            ) from None
    return bias


def parse_structured(
    json_object: bool,
    json_schema: str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> StructuredOutput | None:
    """What the options of structured output ask for, of which one may be given."""
    from hayate.sampling_params import StructuredOutput

    options = {
        "--json-object": json_object or None,
        "--json-schema": json_schema,
        "--regex": regex,
        "--choice": choice or None,
        "--grammar": grammar,
    }
    names = list(given(options))
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} exclude each other; give one of them")
    if json_schema is not None:
        is_text = json_schema.lstrip().startswith("{")
        text = json_schema if is_text else read_text(json_schema, "--json-schema")
        return StructuredOutput.json_schema(text)
    if regex is not None:
        return StructuredOutput.regex(regex)
    if choice:
        return StructuredOutput.choice(choice)
    if grammar is not None:
        return StructuredOutput.grammar(read_text(grammar, "--grammar"))
    return StructuredOutput.json_object() if json_object else None


def read_text(file: str, option: str) -> str:
    """The text of a UTF-8 file that `option` names; - is standard input."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{option} {file} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it, for example with iconv"
        ) from None


def checked_text(text: str, option: str) -> str:
    """`text`, unless the shell passed bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option} is not UTF-8 text at character {error.start}") from None
    return text


def open_llm(
    model: str,
    *,
    revision: str | None,
    device: str,
    dtype: str,
    max_model_len: int | None,
    kv_memory: str | None,
    verbose: bool,
    **engine: Any,
) -> LLM:
    """The loaded model. Wrong values are refused before torch is imported.

    engine: further options of `LLM`; None leaves the default.
    """
    device, dtype = checked_device(device), parse_dtype(dtype)
    check_speculation(engine)
    from hayate.cli.progress import loading_bar
    from hayate.runtime.llm import LLM

    with loading_bar() as progress:
        llm = LLM(
            model,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            revision=revision,
            progress=progress,
            **given(engine),
        )
    if verbose:
        typer.echo(llm.plan.describe(), err=True)
    return llm
