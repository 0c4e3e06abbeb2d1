"""One server over one tiny model for all tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from hayate import LLM, AsyncLLM
from hayate.server.app import create_app
from hayate.server.options import ServerOptions
from tests.server.checkpoint import write_checkpoint
from tests.server.serving import running


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-chat")


@pytest.fixture(scope="session")
def offline(folder: Path) -> LLM:
    """The same model without a server: the truth about answers."""
    return LLM(folder, device="cpu", kv_memory="16M")


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(folder, device="cpu", kv_memory="16M")
    asyncio.run(llm.generate("warm-up"))
    yield llm
    asyncio.run(llm.shutdown(drain=False))


@pytest.fixture(scope="session")
def url(llm: AsyncLLM) -> Iterator[str]:
    with running(create_app(llm, ServerOptions(max_samples=16, max_body_bytes=200_000))) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def claude(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
