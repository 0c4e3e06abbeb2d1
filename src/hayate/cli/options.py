"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hayate.config import parse_dtype
from hayate.errors import UsageError

if TYPE_CHECKING:
    from hayate.runtime.llm import LLM

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


def checked_device(text: str) -> str:
    """`text` as auto, cpu, cuda or cuda:N (from a bare N too); nobody looks yet if it exists."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        return text
    if text.isdecimal():
        return f"cuda:{int(text)}"
    raise UsageError(f"--device {text!r} is unknown; use auto, cpu, cuda, cuda:N or N")


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
) -> LLM:
    """The loaded model. Wrong values are refused before torch is imported."""
    device, dtype = checked_device(device), parse_dtype(dtype)
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
        )
    if verbose:
        typer.echo(llm.plan.describe(), err=True)
    return llm
