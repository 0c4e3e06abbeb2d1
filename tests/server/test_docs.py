"""The commands and programs of docs/serving.md work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CURL = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if "curl" in line
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def at(url: str, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", url).replace("smollm2-135m", "tiny-chat")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURL)
def test_curl(url: str, line: str) -> None:
    command = at(url, line).replace("curl ", "curl --silent --show-error --fail ", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert b'"error"' not in done.stdout


@pytest.mark.parametrize("program", PYTHON, ids=range(len(PYTHON)))
def test_python(url: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The tiny model's text may break off inside a string: its schema has no end to it.
    program = program.replace("name: str", "name: Literal['Paris']")
    code = compile(at(url, program), "docs/serving.md", "exec", dont_inherit=True)
    exec(code, {"__name__": "example", "Literal": Literal})
    assert capsys.readouterr().out.strip()


def test_the_tables_name_every_metric_and_endpoint(url: str) -> None:
    import httpx

    from hayate.server.metrics import ENDPOINTS

    names = re.findall(r"^# TYPE hayate_(\w+) ", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert names
    for name in names:
        assert name.removesuffix("_created") in TEXT, name
    for endpoint in ENDPOINTS:
        assert endpoint in TEXT


def test_every_field_is_documented() -> None:
    from hayate.server.anthropic_types import MessagesRequest
    from hayate.server.openai_types import ChatRequest, CompletionRequest
    from hayate.server.responses import ResponsesRequest
    from hayate.server.vision import AnalyzeRequest

    for model in (ChatRequest, CompletionRequest, AnalyzeRequest):
        for name in model.model_fields:
            assert f"`{name}" in TEXT, name
    for model in (ResponsesRequest, MessagesRequest):
        for name, field in model.model_fields.items():
            if field.annotation is not type(None):
                assert name in TEXT, name
