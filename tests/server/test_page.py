"""The web page: what is served, what its files may contain, its markdown under node, itself in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from hayate import AsyncLLM
from hayate.server import page
from hayate.server.app import create_app
from hayate.server.options import ServerOptions
from hayate.server.page import STATIC
from tests.server.browser import CHROMIUM, Browser
from tests.server.serving import running

FILES = sorted(STATIC.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def node(script: str, *names: str) -> Any:
    """What an expression of the page's modules gives, as JSON; `names` are of the form module.name."""
    imports = "".join(
        f"import {{ {name.split('.')[1]} }} from '{(STATIC / name.split('.')[0]).as_uri()}.js';"
        for name in names
    )
    result = subprocess.run(
        [str(NODE), "--input-type=module"],
        input=f"{imports} console.log(JSON.stringify({script}))",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# -- what is served --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", *(f"static/{file.name}" for file in FILES)])
def test_files(http: httpx.Client, name: str) -> None:
    file = STATIC / (name.removeprefix("static/") or "index.html")
    answer = http.get(f"/{name}")
    assert answer.status_code == 200
    assert answer.content == file.read_bytes()
    assert answer.headers["content-type"] == TYPES[file.suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    again = http.get(f"/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpage.py", "%2e%2e/page.py", "page.py", ""])
def test_nothing_else_is_served(http: httpx.Client, name: str) -> None:
    assert http.get(f"/static/{name}").status_code == 404


def test_server_info(llm: AsyncLLM, url: str) -> None:
    info = httpx.get(f"{url}/v1/server-info").json()
    assert (info["model"], info["max_model_len"]) == ("tiny-chat", 2048)
    assert (info["chat"], info["images"], info["analyze"]) == (True, False, False)
    app = create_app(llm, ServerOptions(api_keys=("k",)))
    with running(app) as other:
        assert httpx.get(f"{other}/").status_code == 200  # the page itself needs no key
        assert httpx.get(f"{other}/static/main.js").status_code == 200
        assert httpx.get(f"{other}/v1/server-info").status_code == 401
        known = httpx.get(f"{other}/v1/server-info", headers={"x-api-key": "k"})
        assert known.json() == info
    with running(create_app(None)) as loading:
        assert httpx.get(f"{loading}/").status_code == 200
        assert httpx.get(f"{loading}/v1/server-info").status_code == 503


# -- what the files contain ------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements of index.html: (tag, attributes), and the texts of labels by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.labelled: set[str | None] = set()  # ids of fields within a <label>
        self._in_label = False
        self.feed((STATIC / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "label":
            self._in_label = True
            self.labelled.add(attributes.get("for"))
        elif self._in_label:
            self.labelled.add(attributes.get("id"))

    def handle_endtag(self, tag: str) -> None:
        self._in_label = self._in_label and tag != "label"

    @property
    def ids(self) -> list[str]:
        return [str(a["id"]) for _, a in self.elements if "id" in a]


PAGE = Page()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere(file: Path) -> None:
    text = file.read_text()
    addresses = re.findall(r"""(?:https?:|["'(])//[^\s"'`)>]+""", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name of SVG's, nothing is fetched
    assert not re.search(r"@import|url\(", text) or file.suffix == ".js"
    for source in re.findall(r"""(?:from|import\() *["']([^"']+)""", text):
        assert source.startswith("./") and (STATIC / source).exists(), source
    if file.suffix == ".js":
        found = re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc",
            text,
        )
        assert found is None
    assert len(text.splitlines()) < 300
    assert file.suffix == ".svg" or re.match(r"(<!doctype html>\n)?(//|/\*|<!--) ", text)


def test_the_document() -> None:
    assert len(PAGE.ids) == len(set(PAGE.ids))
    for tag, attributes in PAGE.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", f"the policy forbids {name}"
            if name in ("src", "href"):
                assert value is not None and value.startswith(("/static/", "#"))
                target = STATIC / value.removeprefix("/static/")
                assert target.exists() or value[1:] in PAGE.ids
            if name in ("for", "aria-controls", "aria-labelledby"):
                assert value in PAGE.ids
        assert tag != "script" or attributes["type"] == "module"
        named = attributes.get("id") in PAGE.labelled or "data-t-label" in attributes
        if tag in ("textarea", "select", "meter") or (
            tag == "input" and "hidden" not in attributes
        ):
            assert named, f"{attributes} has no label"
        if tag == "button":
            assert named or "data-t" in attributes, f"{attributes} has no name"
    tags = [tag for tag, _ in PAGE.elements]
    assert tags.count("main") == tags.count("h1") == tags.count("nav") == 1


def test_scripts_use_ids_that_exist() -> None:
    used: set[str] = set()
    for file in SCRIPTS:
        used |= set(re.findall(r"""\$\(["']([\w-]+)["']\)""", file.read_text()))
    assert len(used) > 30
    assert used <= set(PAGE.ids), used - set(PAGE.ids)
    for style in STATIC.glob("*.css"):
        selectors = re.sub(r"\{[^{}]*\}", "{}", style.read_text())
        assert set(re.findall(r"#([a-z][\w-]*)", selectors)) <= set(PAGE.ids)


@needs_node
def test_every_text_in_both_languages() -> None:
    tables: dict[str, dict[str, str]] = node("TABLES", "strings.TABLES")
    english, japanese = tables["en"], tables["ja"]
    assert english.keys() == japanese.keys()
    used = {
        value
        for _, attributes in PAGE.elements
        for name, value in attributes.items()
        if name.startswith("data-t")
    }
    sources = "".join(file.read_text() for file in SCRIPTS if file.name != "strings.js")
    called = set(re.findall(r"""\bt\(["'](\w+)["']""", sources))
    assert used | called <= english.keys()
    for name, text in english.items():
        fields = sorted(re.findall(r"\{\w+\}", text))
        assert fields == sorted(re.findall(r"\{\w+\}", japanese[name])), name
        assert japanese[name] != text
        assert name in used or re.search(rf"\b{name}\b", sources), f"nobody shows {name}"


# -- markdown --------------------------------------------------------------------------------------

TAGS = {
    *("p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "table", "tr", "th", "td"),
    *("code-block", "code", "em", "strong", "del", "a"),
}


def checked(tree: Any) -> str:
    """The text of a tree, every node of which has an allowed tag and no attribute but the known ones."""
    if isinstance(tree, str):
        return tree
    if isinstance(tree, list):
        return "".join(map(checked, tree))
    assert tree["tag"] in TAGS
    assert tree.keys() <= {"tag", "children", "href", "language", "start"}
    assert ("href" in tree) == (tree["tag"] == "a")
    if "href" in tree:
        assert re.match(r"(https?://|mailto:)", tree["href"], re.IGNORECASE)
    if "start" in tree:
        assert isinstance(tree["start"], int)
    return checked(tree["children"])


def parse(*texts: str) -> list[Any]:
    """The trees of several texts, by one process."""
    trees: list[Any] = node(f"{json.dumps(texts)}.map((text) => parse(text))", "markdown.parse")
    return trees


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></pre><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [y]( javascript:x) [z](&#106;avascript:x)",
    "![x](javascript:alert(1)) ![x](https://evil.example/pixel.png)",
    '[x](https://a.example/"onmouseover="alert(1))',
    "[<img src=x onerror=alert(1)>](https://a.example/)",
    "`<b>` **<i>** _<u>_ ~~<s>~~",
    "# <h1>\n> <q>\n- <li>\n\n| <a> | b |\n|--|--|\n| <td> | d |",
    "&lt;script&gt; &amp; &#60;",
    "__proto__ constructor [x](https://a/__proto__)",
]


@needs_node
def test_hostile_markdown_stays_text() -> None:
    for text, tree in zip(HOSTILE, parse(*HOSTILE), strict=True):
        shown = checked(tree)
        for word in re.findall(r"<[^>]*>|javascript:|&\w+;", text):
            assert word in shown, f"{word} is not shown of {text}"


@needs_node
def test_code_is_verbatim() -> None:
    code = "if a < b and c > d:\n    print('**x** [y](z)')\n\n<script>"
    for text in (f"```py\n{code}\n```", f"```py\n{code}", f"~~~~py\n{code}\n~~~~"):  # also unclosed
        (tree,) = parse(text)
        assert tree == [{"tag": "code-block", "children": [code], "language": "py"}]
    ((paragraph,),) = parse("a `<b> **c**` d")
    assert paragraph["children"] == ["a ", {"tag": "code", "children": ["<b> **c**"]}, " d"]


@needs_node
def test_markdown_forms() -> None:
    nested, marks, table = parse(
        "1. one\n   - sub\n2. two\n\n   more\n\nafter",
        "**bold _em_** ***both*** ~~gone~~ 2 * 3 * 4 snake_case_name \\*plain\\* **open",
        "| a | b |\n|---|:-:|\n| 1 | *2* |",
    )
    sub = {"tag": "ul", "children": [{"tag": "li", "children": ["sub"]}]}
    more = {"tag": "p", "children": ["more"]}
    assert nested == [
        {
            "tag": "ol",
            "children": [
                {"tag": "li", "children": ["one", sub]},
                {"tag": "li", "children": ["two", more]},
            ],
        },
        {"tag": "p", "children": ["after"]},
    ]
    em = {"tag": "em", "children": ["em"]}
    assert marks[0]["children"] == [
        {"tag": "strong", "children": ["bold ", em]},
        " ",
        {"tag": "strong", "children": [{"tag": "em", "children": ["both"]}]},
        " ",
        {"tag": "del", "children": ["gone"]},
        " 2 * 3 * 4 snake_case_name *plain* **open",
    ]
    assert [[cell["tag"] for cell in row["children"]] for row in table[0]["children"]] == [
        ["th", "th"],
        ["td", "td"],
    ]


@needs_node
def test_headings() -> None:
    written = ["# a", "## a ##", "###   a # b ###  ", "# a#", "# #", "#a", "# a" + " " * 9 + "#"]
    trees = parse(*written)
    shown = [(tree[0]["tag"], "".join(tree[0]["children"])) for tree in trees]
    wanted = [("h3", "a"), ("h4", "a"), ("h5", "a # b"), ("h3", "a"), ("h3", ""), ("p", "#a")]
    assert shown == [*wanted, ("h3", "a")]


@needs_node
def test_a_heading_of_blanks_takes_no_cubic_time() -> None:
    """A pattern that looks for the end of a heading took 3 seconds; reading it once takes less than a millisecond."""
    for line in ("'# a' + ' '.repeat(2000) + 'b'", "'# ' + ' '.repeat(100000) + 'b\\u2028c'"):
        clock = f"(() => {{ const begin = performance.now(); parse({line}); return performance.now() - begin; }})()"
        assert node(clock, "markdown.parse") < 100  # milliseconds


@needs_node
def test_markdown_takes_no_quadratic_time() -> None:
    """200,000 characters of each in the time of the process; a quadratic reader would take minutes."""
    units = [
        "*",
        "_a ",
        "**a",
        "`",
        "`` ` ",
        "[",
        "[a](",
        "> ",
        "- ",
        "~~",
        "|-\n",
        "http",
        "# ",
        "1. a\n",
        "<",
    ]
    script = f"{json.dumps(units)}.map((u) => parse(u.repeat(200000 / u.length)).length)"
    assert all(count > 0 for count in node(script, "markdown.parse"))


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    try:
        yield made
    finally:
        made.close()


@needs_browser
def test_a_conversation(browser: Browser, url: str) -> None:
    """Keyboard alone: send, stop, regenerate, edit; the conversation is there after loading the page again."""
    idle = "document.getElementById('stop').hidden"
    texts = "[...document.querySelectorAll('#messages .body')].map((e) => e.textContent)"
    browser.open(url)
    browser.run(
        "localStorage.setItem('hayate.settings', '{\"max_tokens\": 12, \"temperature\": 0}')"
    )
    browser.open(f"{url}/?again")
    browser.until("document.getElementById('model').textContent === 'tiny-chat'")
    browser.run("document.getElementById('prompt').focus()")
    question = "Hello <img src=x onerror=alert(1)>"
    browser.type(question)
    browser.press("Enter", 13)
    browser.until("document.querySelector('#messages .figures')")
    first = browser.run(texts)
    assert first[0] == question and len(first) == 2
    assert "12 tokens" in browser.run("document.querySelector('.figures').textContent")
    assert "complete" in browser.run("document.getElementById('announcer').textContent")
    assert browser.run("document.getElementById('context').value") > 12
    # Greedy: the same again.
    browser.run("document.querySelector('.assistant button:nth-child(3)').click()")
    browser.until(f"document.querySelector('.assistant .figures') && {idle}")
    assert browser.run(texts) == first
    # A changed question, another answer; a long one, which is stopped by Escape.
    browser.run("document.getElementById('max_tokens').value = 1900")
    browser.run("document.querySelector('.user button:nth-child(2)').click()")
    assert browser.run("document.activeElement.tagName") == "TEXTAREA"
    browser.run("document.activeElement.select()")
    browser.type("Changed")
    browser.run("document.querySelector('.editing button').click()")
    browser.until("document.querySelector('.assistant .body').textContent.length > 0")
    browser.press("Escape", 27)
    browser.until(f"{idle} && document.querySelector('.assistant .figures')")
    assert "Stopped" in browser.run("document.querySelector('.figures').textContent")
    shown = browser.run(texts)
    assert shown[0] == "Changed"
    browser.open(f"{url}/?third")
    browser.until("document.querySelector('#conversations .title')")
    browser.run("document.querySelector('#conversations .title').click()")
    assert browser.run(texts) == shown
    assert browser.problems == []


@needs_browser
def test_hostile_answers_do_nothing(browser: Browser, url: str) -> None:
    """Answers as a stored conversation has them, shown by the page itself."""
    browser.open(url)
    messages = [{"role": "assistant", "text": text} for text in HOSTILE]
    stored = {"id": "1", "title": "<b>x</b>", "updated": 1, "messages": messages}
    value = json.dumps(json.dumps(stored))
    browser.run(
        f"localStorage.setItem('hayate.chat.1', {value}); window.alert = () => {{ throw 1 }}"
    )
    browser.open(f"{url}/?again")
    browser.until("document.querySelector('#conversations .title')")
    browser.run("document.querySelector('#conversations .title').click()")
    assert browser.run("document.querySelectorAll('#messages .body').length") == len(HOSTILE)
    for selector in (
        "#messages script",
        "#messages img",
        "#messages [onerror]",
        "#conversations b",
    ):
        assert browser.run(f"document.querySelectorAll('{selector}').length") == 0
    links = browser.run("[...document.querySelectorAll('#messages a')].map((a) => a.protocol)")
    assert set(links) == {"https:"}
    assert "<script>alert(1)</script>" in browser.run(
        "document.querySelector('#messages .body').textContent"
    )
    # The policy holds even against the page's own mistakes.
    assert (
        browser.run(
            "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'set' } catch (e) { return e.name } })()"
        )
        == "TypeError"
    )


@needs_browser
def test_key_language_and_dialogs(browser: Browser, llm: AsyncLLM) -> None:
    with running(create_app(llm, ServerOptions(api_keys=("k",)))) as url:
        browser.open(url)
        browser.until("document.getElementById('settings').open")
        assert browser.run("document.activeElement.id") == "key"
        browser.type("k")
        browser.press("Escape", 27)
        browser.until("document.getElementById('model').textContent === 'tiny-chat'")
        browser.run(
            "document.getElementById('language').value = 'ja';"
            "document.getElementById('language').dispatchEvent(new Event('change'))"
        )
        assert browser.run("document.documentElement.lang") == "ja"
        assert browser.run("document.getElementById('new').textContent") == "新しい会話"
        browser.run("document.getElementById('open-dashboard').click()")
        browser.until("document.querySelectorAll('#figures dd').length === 7")
        problems = [p for p in browser.problems if "401" not in p]  # of the first attempt
        assert problems == []


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def vision_server(received: list[dict[str, Any]]) -> FastAPI:
    """The page before endpoints that take images and write down what comes."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/server-info")
    async def info() -> dict[str, Any]:
        names = dict.fromkeys(("chat", "images", "analyze"), True)
        return {"model": "eyes", "max_model_len": 100, **names}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        received.append(await request.json())
        if len(received) > 1:
            return JSONResponse({"error": {"message": "<b>too large</b>"}}, 413)
        choice = {"index": 0, "delta": {"content": "a dot"}, "finish_reason": "stop"}
        return Response(f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")

    @app.post("/v1/vision/analyze")
    async def analyze(request: Request) -> Response:
        form = await request.form()
        image = form["image"]
        assert not isinstance(image, str)
        received.append({**dict(form), "image": await image.read()})
        fields = {"caption": "<i>a dot</i>", "objects": ["dot", "paper"]}
        return JSONResponse({"fields": fields, "timings": {"encode": 0.0125}, "slices": 1})

    app.include_router(page.router)
    return app


@needs_browser
def test_images(browser: Browser) -> None:
    """A chosen image goes out as a data: URL beside the text; the form sends the file itself."""
    received: list[dict[str, Any]] = []
    choose = (
        f"((id) => {{ const bytes = Uint8Array.from(atob('{PIXEL}'), (c) => c.charCodeAt(0));"
        "const files = new DataTransfer(); files.items.add(new File([bytes], 'a.png', {type: 'image/png'}));"
        "const input = document.getElementById(id); input.files = files.files;"
        "input.dispatchEvent(new Event('change')) })"
    )
    with running(vision_server(received)) as url:
        browser.open(url)
        browser.until("!document.getElementById('attach').hidden")
        browser.run(f"{choose}('image-file')")
        browser.until("document.querySelector('#previews img')?.naturalWidth === 1")
        browser.run("document.getElementById('prompt').focus()")
        browser.type("What is it?")
        browser.press("Enter", 13)
        browser.until("document.querySelector('.assistant .body')?.textContent === 'a dot'")
        (parts,) = [message["content"] for message in received[0]["messages"]]
        assert parts == [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
            {"type": "text", "text": "What is it?"},
        ]
        assert browser.run("document.querySelectorAll('.user img, #previews img').length") == 1
        browser.until("document.getElementById('stop').hidden")
        browser.type("And now?")
        browser.press("Enter", 13)
        browser.until("document.querySelector('.failure')")
        assert browser.run("document.querySelector('.failure').textContent") == "<b>too large</b>"
        assert [m["role"] for m in received[1]["messages"]] == ["user", "assistant", "user"]

        browser.run("document.getElementById('open-analyze').click()")
        browser.run(f"{choose}('analyze-image')")
        browser.run(
            "document.getElementById('analyze-mode').value = 'ask';"
            "document.getElementById('analyze-mode').dispatchEvent(new Event('change'));"
            "document.getElementById('analyze-question').value = 'Why?';"
            "document.getElementById('analyze-run').click()"
        )
        browser.until("document.querySelector('#analyze-fields dd')")
        form = received[2]
        assert form.pop("image") == base64.b64decode(PIXEL)
        assert form == {"mode": "ask", "question": "Why?", "language": "en"}
        shown = browser.run("document.getElementById('analyze').innerText")
        assert "<i>a dot</i>" in shown and "dot\npaper" in shown and "12.5 ms" in shown
    assert [p for p in browser.problems if "413" not in p] == []
