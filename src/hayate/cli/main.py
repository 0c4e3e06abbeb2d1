"""The application: its verbs, and how every way to fail becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

from hayate import __version__
from hayate.cli import (
    analyze,
    bench,
    chat,
    data,
    env,
    generate,
    inspect,
    perplexity,
    pull,
    quantize,
    serve,
    train,
    upcycle,
)
from hayate.errors import HayateError

INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done · 1 defect · 2 wrong usage · 3 model not found or not valid · "
    "4 device not available · 5 out of memory · 6 GPU or process failed · 130 interrupted."
)

app = typer.Typer(
    name="hayate",
    help="Run a Hugging Face model folder as it is, on an NVIDIA GPU or on the CPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `hayate.errors` for the codes."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no defect
    verbose = "--verbose" in arguments
    return _report(lambda: app(args=arguments, prog_name="hayate", standalone_mode=False), verbose)


def _report(action: Callable[[], Any], verbose: bool) -> int:
    """Run `action`; print its failure as one line on standard error; return the exit code."""
    try:
        result = action()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:  # the reader, `head` for example, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except (typer.Exit, SystemExit) as error:
        code = getattr(error, "exit_code", getattr(error, "code", 0))
        return code if isinstance(code, int) else 1
    except HayateError as error:
        if verbose:
            traceback.print_exc()
        _complain(f"error: {_one_line(error)}")
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # how typer says that the arguments are wrong
            return _complain_usage(error)
        if verbose:
            traceback.print_exc()
        hint = "" if verbose else "; run with --verbose for the traceback"
        _complain(f"internal error: {type(error).__name__}: {_one_line(error)}{hint}")
        return 1


def _complain(text: str) -> None:
    print(f"hayate: {text}", file=sys.stderr, flush=True)


def _complain_usage(error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "hayate"
        _complain(f"error: {_one_line(message)} (see `{command} --help`)")
    return 2


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or "no further information"


def _verb(function: Callable[..., Any]) -> Callable[..., int]:
    """The verb with its failures reported here: typer would catch some of them its own way."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> int:
        return _report(lambda: function(*args, **kwargs), bool(kwargs.get("verbose")))

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hayate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


app.command("generate")(_verb(generate.generate))
app.command("chat")(_verb(chat.chat))
app.command("analyze")(_verb(analyze.analyze))
app.command("serve")(_verb(serve.serve))
app.command("inspect")(_verb(inspect.inspect))
app.command("pull")(_verb(pull.pull))
app.command("quantize")(_verb(quantize.quantize))
app.command("env")(_verb(env.env))
app.command("bench")(_verb(bench.bench))
app.command("train", context_settings={"ignore_unknown_options": True})(_verb(train.train))
app.command("upcycle")(_verb(upcycle.upcycle))
app.command("perplexity")(_verb(perplexity.perplexity))
app.command("plot")(_verb(train.plot))

_data = typer.Typer(help="Prepare text for training.", no_args_is_help=True)
_data.command("prepare")(_verb(data.prepare))
_data.command("fetch")(_verb(data.fetch))
app.add_typer(_data, name="data")

_tokenizer = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)
_tokenizer.command("train")(_verb(data.train_tokenizer))
app.add_typer(_tokenizer, name="tokenizer")
