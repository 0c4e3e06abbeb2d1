"""Every command of README.md and of the examples runs, except in blocks marked as not run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NOT_RUN = "<!-- not run by the tests:"


class Block(NamedTuple):
    file: str
    line: int
    language: str
    text: str
    is_run: bool


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file; a comment on the line before marks one as not run."""
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        is_run = not lines[start - 1].startswith(NOT_RUN)
        text = "\n".join(lines[start + 1 : number])
        name = str(path.relative_to(ROOT))
        found.append(Block(name, start + 1, lines[start][3:], text, is_run))
        start = None
    assert start is None, f"{path}: the block at line {start} does not end"
    return found


README = blocks(ROOT / "README.md")
EXAMPLES = [block for path in sorted(ROOT.glob("examples/*/README.md")) for block in blocks(path)]


def commands(found: list[Block]) -> list[tuple[str, str, str]]:
    """(place, command, beginning of its output) of every shell line that is run. The output is a
    `text` block after that of the command, in the same file; else it is empty."""
    result = []
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "bash" or not block.is_run:
            continue
        shows_output = after is not None and after.language == "text" and after.file == block.file
        for offset, line in enumerate(block.text.splitlines()):
            place = f"{block.file}:{block.line + 1 + offset}"
            result.append((place, line, after.text if after and shows_output else ""))
    return result


COMMANDS = commands(README) + commands(EXAMPLES)


def without_trailing_blanks(text: str) -> str:
    """Editors strip them from Markdown."""
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The path of an activated environment: `hayate` is the code under test."""
    folder = tmp_path_factory.mktemp("bin")
    shim = folder / "hayate"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hayate "$@"\n')
    shim.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "output"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS]
)
def test_command(command: str, output: str, environment: dict[str, str], tmp_path: Path) -> None:
    if command.startswith("make") and not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("this checkout was not set up by `make setup`")
    # In the checkout, but nothing is written there.
    line = command.replace("figures.txt", str(tmp_path / "figures.txt"))
    line = line.replace(".venv/bin/python", sys.executable)
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    if "chat --model" not in command:  # without input there is no conversation
        assert result.stdout.strip()
    assert without_trailing_blanks(result.stdout).startswith(without_trailing_blanks(output))
    if command.startswith("hayate generate") and "--json" not in command:
        assert "tokens/s" in result.stderr
        assert "tokens/s" not in result.stdout


PYTHON = [block for block in README if block.language == "python"]


@pytest.mark.real_model
@pytest.mark.slow
def test_python_block(environment: dict[str, str]) -> None:
    block = PYTHON[0]
    check = "\nassert logits.shape == (len(output.prompt_token_ids), llm.config.vocab_size)\n"
    result = subprocess.run(
        [sys.executable, "-c", block.text + check],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


@pytest.mark.real_model
@pytest.mark.slow
def test_asyncio_block(environment: dict[str, str]) -> None:
    _, block = PYTHON
    result = subprocess.run(
        [sys.executable, "-c", block.text],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    stream, *_ = result.stdout.splitlines()
    assert "Paris" in stream
    assert result.stdout.count(" length") + result.stdout.count(" stop") == 8


def test_shape_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert README[0].line <= 20, "a command stands within the first 20 lines"
    marked = [block.text for block in README if not block.is_run]
    first_lines = ("git clone", "hayate bench equality", "hayate serve", "make train-demo")
    assert len(marked) == len(first_lines)
    assert all(text.startswith(first) for text, first in zip(marked, first_lines, strict=True))


def test_documented_options_and_codes_exist() -> None:
    """Each option in the tables is one of the command's, and the other way round."""
    import typer

    from hayate import errors
    from hayate.cli.main import app

    group = typer.main.get_command(app)
    declared: set[str] = set()
    for verb in ("generate", "chat"):
        for parameter in group.commands[verb].params:  # type: ignore[attr-defined]
            names = (*parameter.opts, *parameter.secondary_opts)
            declared |= {name for name in names if name.startswith("--")}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    options = text.split("## Options")[1].split("## Exit codes")[0]
    written = set(re.findall(r"--[a-z][a-z-]*", options))
    # Shown in the sections above, or the default form of a pair.
    elsewhere = {"--model", "--revision", "--stream", "--help"}
    assert written <= declared
    assert declared - written <= elsewhere

    codes = text.split("## Exit codes")[1].split("## Architectures")[0]
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", codes, re.MULTILINE)}
    assert documented == {c.exit_code for c in classes} | {0, 130}  # type: ignore[attr-defined]


def test_architectures_are_the_supported_ones() -> None:
    from hayate.models import FAMILIES

    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Architectures")[1]
    assert set(re.findall(r"\w+ForCausalLM|MiniCPMV", text)) == set(FAMILIES)
