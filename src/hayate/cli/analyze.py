"""`hayate analyze`: images in, what they show out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hayate.cli import options
from hayate.cli.layout import aligned
from hayate.config import parse_dtype
from hayate.errors import GpuFault, HayateError, UsageError

if TYPE_CHECKING:
    from hayate.vision_core.answers import Answer
    from hayate.vision_core.core import VisionCore

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".avif", ".jp2", ".ico"),
)
FULL = "full"


def analyze(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")
    ],
    simple: Annotated[
        bool, typer.Option("--simple", help="The profile's short form, of three fields.")
    ] = False,
    ask: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask this instead, and print the answer.")
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also the folders in folders.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    model: options.Model = "openbmb/MiniCPM-V-2_6-int4",
    profile: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Fields and wording, as TOML.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the profile: en or ja.")
    ] = None,
    max_side: Annotated[
        str,
        typer.Option(metavar="N|full", help="Make images smaller: at most N pixels a side."),
    ] = "512",
    max_slices: Annotated[
        int | None, typer.Option(metavar="N", help="Most tiles of an image, 1 to 9.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", metavar="N", help="Of an answer (512).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="0 is greedy (0.3).")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Same seed, same text.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Use no more than this: 7G.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    verbose: options.Verbose = False,
) -> int:
    """Describe images with a vision-language model: fields on standard output.

    One that cannot be read does not stop the others; such are listed at the end, and the exit code is that of the
    first (2 for an image that cannot be read).
    """
    if simple and ask is not None:
        raise UsageError("--simple and --ask exclude each other: a question has no form")
    device, dtype = options.checked_device(device), parse_dtype(dtype)
    side = _parse_side(max_side)
    files = _files(images, recursive)
    from hayate.cli.progress import loading_bar
    from hayate.vision_core.core import VisionCore

    with loading_bar() as progress:
        core = VisionCore(
            model,
            profile=profile,
            language=language,
            max_side=side,
            max_slices=max_slices,
            memory_limit=memory_limit,
            seed=seed,
            **options.given(
                {
                    "device": device,
                    "dtype": dtype,
                    "revision": revision,
                    "max_model_len": max_model_len,
                    "kv_memory": kv_memory,
                    "progress": progress,
                }
            ),
        )
        changes = options.given({"max_tokens": max_tokens, "temperature": temperature})
        core.sampling = dataclasses.replace(core.sampling, **changes)
        plan = core.load().plan
    if verbose:
        typer.echo(plan.describe(), err=True)
    return _Run(core, ask, simple, as_json).all(files)


class _Run:
    """Asks the same of one image after another, and prints what comes."""

    def __init__(self, core: VisionCore, ask: str | None, simple: bool, as_json: bool) -> None:
        self.core = core
        self.ask = ask
        self.simple = simple
        self.as_json = as_json
        # The progress bar takes print() for itself; and where people read the results they need no bar.
        self.out = sys.stdout
        self.is_read = sys.stdout.isatty()
        self.failed: list[tuple[Path, HayateError]] = []

    def all(self, files: list[Path]) -> int:
        """The exit code: 0, or that of the first failure."""
        from hayate.cli.progress import counting_bar

        if self.is_read or len(files) == 1:
            self._each(files, lambda done, total: None)
        else:
            with counting_bar("analyzing") as progress:
                self._each(files, progress or (lambda done, total: None))
        return self.failed[0][1].exit_code if self.failed else 0

    def _each(self, files: list[Path], progress: Callable[[int, int], None]) -> None:
        try:
            for number, file in enumerate(files):
                progress(number, len(files))
                try:
                    self._one(file, titled=len(files) > 1)
                except GpuFault:
                    raise
                except HayateError as error:
                    self.failed.append((file, error))
                    if self.as_json:
                        self._print(_line({"image": str(file), "error": str(error)}))
        finally:
            self._list_failures(len(files))

    def _one(self, file: Path, *, titled: bool) -> None:
        title = f"{file}:\n" if titled and not self.as_json else ""
        if self.ask is not None and self.is_read and not self.as_json:
            for i, piece in enumerate(self.core.stream(str(file), self.ask)):
                self._print(piece if i else title + piece.lstrip(), end="")
            self._print("\n" if titled else "")
            return
        answer = self._answer(file)
        self._print(_line(_record(file, answer)) if self.as_json else title + _text(answer))
        if titled and not self.as_json:
            self._print("")

    def _answer(self, file: Path) -> Answer:
        if self.ask is not None:
            return self.core.ask(str(file), self.ask)
        return self.core.analyze_simple(str(file)) if self.simple else self.core.analyze(str(file))

    def _print(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def _list_failures(self, count: int) -> None:
        if self.failed:
            lines = [f"{len(self.failed)} of {count} images failed:"]
            lines += [f"  {file}: {' '.join(str(error).split())}" for file, error in self.failed]
            print("\n".join(lines), file=sys.stderr, flush=True)


def _parse_side(text: str) -> int | None:
    if text == FULL:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--max-side {text!r} must be a number of pixels, or {FULL}")
    return int(text)


def _files(paths: list[Path], recursive: bool) -> list[Path]:
    """Files as they are named, even what looks like no image; of folders, in order, the images."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = path.rglob("*") if recursive else path.iterdir()
        found = sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            hint = "" if recursive else "; with --recursive its folders are searched too"
            raise UsageError(f"{path} holds no images ({', '.join(SUFFIXES)}){hint}")
        files += found
    return files


def _text(answer: Answer) -> str:
    fields = getattr(answer, "fields", None)
    if fields is None:
        return answer.text
    values = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }
    lines = [(name, " ".join(value.split())) for name, value in values.items()]
    if answer.finish_reason == "length":
        lines.append(("(cut short)", "the answer reached --max-tokens"))
    return aligned(lines)


def _record(file: Path, answer: Answer) -> dict[str, Any]:
    record = dataclasses.asdict(answer)
    what = "fields" if "fields" in record else "text"
    rest = {name: record[name] for name in ("finish_reason", "timings", "peak_memory")}
    return {"image": str(file), what: record[what], **rest}


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
