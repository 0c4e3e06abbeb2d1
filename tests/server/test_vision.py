"""Images over HTTP, on a tiny MiniCPM-V: answers are those of `LLM.chat` and `VisionCore`; strangers open nothing."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from hayate import LLM, AsyncLLM, SamplingParams, VisionCore
from hayate.errors import UsageError
from hayate.server.app import create_app
from hayate.server.options import ServerOptions
from hayate.vision.slicing import plan_slices
from hayate.vision_core.profile import DEFAULT_SAMPLING
from tests.server.serving import Command, running, until
from tests.vision.checkpoints import write_minicpmv

ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "kv_memory": "16M",
    "max_model_len": 2048,
}
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
FIXED: dict[str, Any] = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}}
OPTIONS = ServerOptions(max_images=2, max_pixels=150_000, max_body_bytes=400_000)
LIMITS = {"max_tokens": 40, "seed": 3}
PATH = "/v1/vision/analyze"
QUESTION = "What is it?"


def png(seed: int, width: int, height: int) -> bytes:
    """Coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SMALL, LARGE = png(1, 100, 80), png(2, 300, 200)  # one picture, and seven


def data_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def bomb() -> bytes:
    """A PNG of some 60 bytes that says it has 10^10 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0"))


def asking(*urls: str, detail: str | None = None) -> list[Any]:
    extra = {} if detail is None else {"detail": detail}
    images = [{"type": "image_url", "image_url": {"url": url, **extra}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]


def shown(*files: bytes) -> list[dict[str, Any]]:
    """The same conversation as `LLM.chat` takes it."""
    images = [{"type": "image", "image": file} for file in files]
    return [{"role": "user", "content": [*images, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision") / "tiny-eyes"
    write_minicpmv(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(eyes: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(eyes, **ENGINE)
    yield llm
    asyncio.run(llm.shutdown(drain=False))


@pytest.fixture(scope="module")
def truth(seeing: AsyncLLM) -> LLM:
    return LLM.sharing(seeing)


@pytest.fixture(scope="module")
def core(eyes: Path) -> Iterator[VisionCore]:
    sampling = dataclasses.replace(DEFAULT_SAMPLING, max_tokens=LIMITS["max_tokens"])
    with VisionCore(eyes, sampling=sampling, seed=LIMITS["seed"], **ENGINE) as core:
        yield core


@pytest.fixture(scope="module")
def site(seeing: AsyncLLM) -> Iterator[str]:
    with running(create_app(seeing, OPTIONS)) as url:
        yield url


@pytest.fixture(scope="module")
def web(site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def fetching(seeing: AsyncLLM) -> Iterator[str]:
    with running(create_app(seeing, dataclasses.replace(OPTIONS, fetch_images=True))) as url:
        yield url


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


# -- conversations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "detail"), [([SMALL], None), ([LARGE], "low"), ([LARGE, SMALL], "high")]
)
def test_openais_client(site: str, truth: LLM, files: list[bytes], detail: str | None) -> None:
    wanted = truth.chat(shown(*files), GREEDY, max_slices=1 if detail == "low" else None)[0]
    messages = asking(*map(data_url, files), detail=detail)
    client = openai.OpenAI(base_url=f"{site}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="tiny-eyes", messages=messages, **FIXED)
    assert answer.choices[0].message.content == wanted.outputs[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    events = client.chat.completions.create(
        model="tiny-eyes", messages=messages, stream=True, **FIXED
    )
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == wanted.outputs[0].text


def test_anthropics_client(site: str, truth: LLM) -> None:
    wanted = truth.chat(shown(LARGE), dataclasses.replace(GREEDY, ignore_eos=False))[0]
    source = {"type": "base64", "media_type": "image/png"}
    image = {"type": "image", "source": {**source, "data": base64.b64encode(LARGE).decode()}}
    messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    client = anthropic.Anthropic(base_url=site, api_key="none", max_retries=0)
    answer = client.messages.create(model="tiny-eyes", max_tokens=10, messages=messages)
    assert answer.content[0].type == "text"
    assert answer.content[0].text == wanted.outputs[0].text
    counted = client.messages.count_tokens(model="tiny-eyes", messages=messages)
    assert counted.input_tokens == len(wanted.prompt_token_ids)


def test_tokens_and_marks_in_texts(web: httpx.Client, truth: LLM) -> None:
    """What a user writes is no picture, whatever it looks like."""
    messages = [*asking(data_url(SMALL)), {"role": "assistant", "content": "<image><unk></image>"}]
    messages += [{"role": "user", "content": "and </slice>?"}]
    wanted = truth.requests.read([*shown(SMALL), *messages[1:]]).ids
    assert web.post("/tokenize", json={"messages": messages}).json()["tokens"] == wanted


def test_what_the_page_may_offer(web: httpx.Client, http: httpx.Client) -> None:
    for client, sees in ((web, True), (http, False)):
        info = client.get("/v1/server-info").json()
        assert (info["images"], info["analyze"]) == (sees, sees)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (data_url(b"hello"), "not an image"),
        (data_url(LARGE[:-200]), "cut short or corrupt"),
        (data_url(bomb()), "pixels"),
        (data_url(png(1, 500, 400)), "pixels"),  # --max-pixels
        (data_url(png(1, 100, 1)), "too thin"),
        ("data:image/png;base64,????", "base64"),
        ("data:image/png,\ud800", "Unicode"),
        ("data:image/svg+xml;base64,AAAA", "svg"),
        ("data:image/png;base64," + "A" * 64, "not an image"),
        ("http://127.0.0.1/a.png", "--fetch-images"),
        ("file:///etc/passwd", "fetches none"),
        ("", "fetches none"),
    ],
    ids=range(12),
)
def test_bad_images_are_refused_by_name(web: httpx.Client, url: str, word: str) -> None:
    messages = asking(url)
    messages[0]["content"].reverse()  # the text comes first

    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        """httpx itself does not send what is not Unicode."""
        headers = {"Content-Type": "application/json"}
        return web.post(path, content=json.dumps(body), headers=headers)

    error = refusal(post("/v1/chat/completions", {"messages": messages}))
    assert error["param"] == "messages[0].content[1]"
    assert word in error["message"] and error["message"].startswith(error["param"])
    source = {"type": "url", "url": url}
    messages[0]["content"][1] = {"type": "image", "source": source}
    error = refusal(post("/v1/messages", {"messages": messages, "max_tokens": 4}))
    assert error["type"] == "invalid_request_error"
    assert "messages[0].content[1]" in error["message"] and word in error["message"]
    error = refusal(post(PATH, {"image": url}))
    assert error["param"] == "image" and word in error["message"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_no_path_is_opened(web: httpx.Client, fetching: str, tmp_path: Path, prefix: str) -> None:
    """Not even of a file that is an image, whatever the server may fetch."""
    path = tmp_path / "secret.png"
    path.write_bytes(SMALL)
    url = f"{prefix}{path}"
    for base in (str(web.base_url), fetching):
        answer = httpx.post(f"{base}/v1/chat/completions", json={"messages": asking(url)})
        assert refusal(answer)["param"] == "messages[0].content[0]"
        refusal(httpx.post(f"{base}{PATH}", json={"image": url}))
        refusal(httpx.post(f"{base}{PATH}", files={"image": (None, url)}))
    part = {"type": "image", "image": url}  # of `LLM.chat`, not of any protocol
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert refusal(web.post("/v1/chat/completions", json=body))["param"] == "messages[0].content[0]"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:8000/metrics",
        "ftp://example.org/a.png",
    ],
)
def test_nothing_inside_is_fetched(fetching: str, url: str) -> None:
    answer = httpx.post(f"{fetching}/v1/chat/completions", json={"messages": asking(url)})
    error = refusal(answer)
    assert error["param"] == "messages[0].content[0]"
    assert any(word in error["message"] for word in ("not public", "port 8000", "only http"))


def test_limits_of_a_request(web: httpx.Client) -> None:
    small, large = data_url(SMALL), data_url(LARGE)

    def chat(messages: list[Any], **fields: Any) -> httpx.Response:
        return web.post("/v1/chat/completions", json={"messages": messages, **fields})

    error = refusal(chat(asking(small, small, small)))
    assert error["param"] == "messages[0].content[2]" and "--max-images" in error["message"]
    big = data_url(png(3, 300, 400))  # alone they fit
    assert refusal(chat(asking(large, big)))["param"] == "messages[0].content[1]"
    assert refusal(chat(asking(data_url(b"\0" * 400_000))), 413)["code"] == "body_too_large"
    mixed = asking(small, detail="low")
    mixed[0]["content"] += asking(small)[0]["content"]
    assert "detail" in refusal(chat(mixed))["message"]
    for role in ("system", "assistant"):
        wrong = [{**asking(small)[0], "role": role}, {"role": "user", "content": "hi"}]
        assert "of the user" in refusal(chat(wrong))["message"]
    for name in ("files", "max_slices", "num_queries"):
        error = refusal(chat(asking(small), chat_template_kwargs={name: 1}))
        assert name in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_images_that_the_cache_cannot_hold(eyes: Path, stream: bool) -> None:
    """The request's own doing, which its client can change: no failure of the server's."""
    llm = AsyncLLM(eyes, **ENGINE, image_cache="3K")
    body = {"messages": asking(data_url(LARGE)), "stream": stream}
    with running(create_app(llm, OPTIONS)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    if stream:  # the head is out by then
        events = [line for line in answer.text.split("\n\n") if '"error"' in line]
        error = json.loads(events[0].removeprefix("data: "))["error"]
    else:
        error = refusal(answer)
    assert error["type"] == "invalid_request_error"
    assert "show fewer images" in error["message"]


def test_only_the_documented_formats_are_opened(web: httpx.Client) -> None:
    """Whatever an upload calls itself."""
    image = Image.new("RGB", (64, 64))
    for kind, status in (("BMP", 200), ("GIF", 200), ("TIFF", 400), ("ICO", 400), ("PPM", 400)):
        file = io.BytesIO()
        image.save(file, kind)
        upload = {"image": ("a.png", file.getvalue(), "image/png")}
        answer = web.post(PATH, data={"max_tokens": 1}, files=upload)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert "none of PNG, JPEG, WEBP, GIF, BMP" in refusal(answer)["message"]


def test_pixels_of_all_requests_together(seeing: AsyncLLM) -> None:
    """SMALL has 8,000 pixels, LARGE 60,000. A request holds those of its images until it has been answered."""
    options = dataclasses.replace(OPTIONS, max_pixels=65_000, max_open_pixels=65_000)
    small, large = ({"messages": asking(data_url(file))} for file in (SMALL, LARGE))
    long = {**small, "stream": True, "max_tokens": 1500, "ignore_eos": True}
    path = "/v1/chat/completions"
    with (
        running(create_app(seeing, options)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for _ in range(3):  # each gives back what it took
            assert client.post(path, json={**large, "max_tokens": 1}).status_code == 200
            refusal(client.post(path, json={"messages": asking(data_url(LARGE[:-200]))}))
        with client.stream("POST", path, json=long) as stream:
            chunks = stream.iter_bytes()
            next(chunks)
            answer = client.post(path, json={**large, "max_tokens": 1})
            assert "--max-open-pixels" in refusal(answer, 429)["message"]
            assert answer.headers["Retry-After"] == "1"
            assert client.post(path, json={**small, "max_tokens": 1}).status_code == 200
        # The client has left; the server needs a moment to see it.
        until(lambda: client.post(path, json={**large, "max_tokens": 1}).status_code == 200)
    with pytest.raises(UsageError, match="--max-open-pixels 9 must be at least --max-pixels"):
        ServerOptions(max_open_pixels=9)


# -- /v1/vision/analyze ----------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "language"), [("full", "en"), ("simple", "ja")])
def test_analyze(web: httpx.Client, core: VisionCore, mode: str, language: str) -> None:
    core.wording = core.profile.wording(language)
    file = png(5 if mode == "full" else 6, 300, 200)  # the server has not seen it
    wanted = core.analyze(file) if mode == "full" else core.analyze_simple(file)
    fields = {"mode": mode, "language": language, **LIMITS}
    sent = web.post(PATH, json={"image": data_url(file), **fields})
    form = web.post(PATH, data=fields, files={"image": ("a.png", file, "image/png")})
    for answer in (sent, form):
        assert answer.status_code == 200, answer.text
        result = answer.json()
        assert result["fields"] == wanted.fields
        assert list(result["fields"]) == list(wanted.fields)
        assert result["finish_reason"] == wanted.finish_reason
        times = dict(result["timings"])
        total = times.pop("total")
        assert list(times) == ["decode", "preprocess", "encode", "prefill", "generate"]
        assert all(t >= 0 for t in times.values()) and times["decode"] > 0
        assert sum(times.values()) <= total
        assert result["usage"]["prompt_tokens"] == wanted.timings.num_prompt_tokens
        assert result["usage"]["completion_tokens"] == wanted.timings.num_generated_tokens
        plan = plan_slices(300, 200, resolution=112)
        assert plan.grid is not None and plan.tile is not None
        assert result["slices"]["grid"] == list(plan.grid)
        tiles = [list(plan.tile)] * (plan.num_pictures - 1)
        assert result["slices"]["sizes"] == [list(plan.overview), *tiles]
    assert sent.json()["timings"]["encode"] > 0
    assert form.json()["timings"]["encode"] == 0  # by then it is known


def test_large_images_are_made_smaller(web: httpx.Client, truth: LLM) -> None:
    """To 512 pixels unless told otherwise, as VisionCore does."""
    file = png(4, 1024, 100)
    sizes = {}
    for side in (None, "full", 64):
        answer = web.post(PATH, json={"image": data_url(file), "max_side": side, "max_tokens": 1})
        sizes[side] = answer.json()["slices"]["sizes"]
    for side, width, height in ((None, 512, 50), ("full", 1024, 100), (64, 64, 6)):
        plan = plan_slices(width, height, resolution=112)
        assert sizes[side][0] == list(plan.overview)
        assert len(sizes[side]) == plan.num_pictures


def test_questions(web: httpx.Client, core: VisionCore) -> None:
    wanted = core.ask(SMALL, QUESTION)
    fields = {"image": data_url(SMALL), "mode": "ask", "question": QUESTION, **LIMITS}
    whole = web.post(PATH, json=fields).json()
    assert whole["fields"] == {"answer": wanted.text}
    lines = web.post(PATH, json={**fields, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *pieces, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(piece["text"] for piece in pieces).strip() == wanted.text
    assert (last["fields"], last["slices"]) == (whole["fields"], whole["slices"])


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "image"),
        ({"image": data_url(SMALL), "mode": "half"}, "mode"),
        ({"image": data_url(SMALL), "mode": "ask"}, "question"),
        ({"image": data_url(SMALL), "question": "Why?"}, "question"),
        ({"image": data_url(SMALL), "stream": "true"}, "stream"),
        ({"image": data_url(SMALL), "language": "xx"}, "xx"),
        ({"image": data_url(SMALL), "max_side": "0"}, "max_side"),
        ({"image": data_url(SMALL), "temperature": "-1"}, "temperature"),
        ({"image": data_url(SMALL), "top_k": "1"}, "top_k"),
    ],
    ids=range(9),
)
def test_bad_fields(web: httpx.Client, fields: dict[str, str], word: str) -> None:
    form = {name: (None, value) for name, value in fields.items()} or {"mode": (None, "full")}
    assert word in refusal(web.post(PATH, files=form))["message"]
    assert word in refusal(web.post(PATH, json=fields))["message"]


def test_bad_bodies(web: httpx.Client, http: httpx.Client) -> None:
    image = ("a.png", SMALL, "image/png")
    assert "no images" in refusal(http.post(PATH, files={"image": image}), 404)["message"]
    refusal(http.post("/v1/chat/completions", files={"image": image}), 415)
    refusal(web.post(PATH, content=b"x", headers={"Content-Type": "text/plain"}), 415)
    for kind, content in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\r\n"),
        ("multipart/form-data; boundary=b", b"\xff\xfe"),
        ("application/json", b"{"),
        ("application/json", b"[" * 50_000),
        ("application/json", b"[]"),
    ):
        refusal(web.post(PATH, content=content, headers={"Content-Type": kind}))
    two = [("image", image), ("image", image)]
    refusal(web.post(PATH, files=two))
    refusal(web.post(PATH, files={"image": ("a.png", b"\0" * 500_000, "image/png")}), 413)


def test_forms_of_other_pages(web: httpx.Client, seeing: AsyncLLM) -> None:
    """A browser sends a form of any page without asking first."""

    def send(url: str, origin: str) -> int:
        files: Any = {"image": ("a.png", SMALL, "image/png"), "max_tokens": (None, "1")}
        return httpx.post(f"{url}{PATH}", files=files, headers={"Origin": origin}).status_code

    own = str(web.base_url).rstrip("/")
    assert send(own, own) == 200
    for origin in ("http://evil.example", "null", f"{own}0"):
        assert send(own, origin) == 403
    allowed = dataclasses.replace(OPTIONS, allowed_origins=("http://good.example",))
    with running(create_app(seeing, allowed)) as url:
        assert send(url, "http://good.example") == 200
        assert send(url, "http://evil.example") == 403


# -- the command -----------------------------------------------------------------------------------


def test_options_of_the_command(eyes: Path, folder: Path) -> None:
    arguments = ("--image-cache", "3M", "--max-images", "1", "--max-pixels", "99", "--fetch-images")
    with Command(eyes, "--dtype", "float32", *arguments) as server:
        url = f"{server.url}/v1/chat/completions"
        for images, word in (([SMALL, SMALL], "--max-images"), ([SMALL], "at most 99")):
            answer = httpx.post(url, json={"messages": asking(*map(data_url, images))})
            assert word in refusal(answer)["message"]
        answer = httpx.post(url, json={"messages": asking("http://127.0.0.1/a.png")})
        assert "not public" in refusal(answer)["message"]
    with Command(folder, "--image-cache", "3M", wait=False) as server:
        assert server.end() == 2
        assert "--image-cache 3M" in server.log()
