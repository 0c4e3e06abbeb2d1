"""Where images come from: what is decoded, what is fetched, and what a stranger cannot reach."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hayate.errors import UsageError
from hayate.server.image_source import Address, ImageLimits, is_public, read_image

PIXEL = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
FETCH = ImageLimits(fetch=True, max_bytes=1000, seconds=2.0)


def read(url: str, limits: ImageLimits = FETCH, *, anywhere: bool = False) -> bytes:
    def allowed(address: Address) -> bool:
        return True

    check = allowed if anywhere else is_public
    return asyncio.run(read_image(url, limits, check))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# -- data: URLs ------------------------------------------------------------------------------------


def test_data_urls() -> None:
    assert read(data_url(PIXEL)) == PIXEL
    assert read(data_url(PIXEL, "IMAGE/PNG").replace("data:", "DATA:")) == PIXEL
    assert read("data:image/png;name=a;base64,iVBORw%3D%3D") == b"\x89PNG"
    assert read("data:image/gif,GIF89a%00") == b"GIF89a\x00"


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("data:text/html;base64,AAAA", "form"),
        ("data:image/svg+xml;base64,AAAA", "svg"),
        ("data:image/png;base64,A", "base64"),
        ("data:image/png;base64,AA*A", "base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png", "form"),
        (data_url(bytes(1001)), "1000"),
        ("data:image/png;base64," + "A" * 10_000, "1000"),
        ("data:" + ";a=b" * 100_000, "form"),
    ],
)
def test_data_urls_that_are_refused(url: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        read(url)
    assert len(str(caught.value)) < 300


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "64:ff9b:1::a00:1", "fec0::1", "5f00::1", "192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16",
    ],
)  # fmt: skip
def test_addresses_inside(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_addresses_outside(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


# -- http ------------------------------------------------------------------------------------------


class Site(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, body = "image/png", PIXEL
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404, "secret of the inside")
            return
        if self.path == "/page":
            kind = "text/html; charset=utf-8"
        if self.path == "/large":
            body = bytes(2000)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fetching(site: str) -> None:
    assert read(f"{site}/a.png", anywhere=True) == PIXEL
    assert read(f"{site}/redirect?/redirect?/a.png", anywhere=True) == PIXEL


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/missing", "404"),
        ("/page", "text/html"),
        ("/large", "1000 bytes"),
        ("/slow", "seconds|TimeoutError"),
        ("/redirect?/redirect?/redirect?/redirect?/a", "redirects"),
        ("/redirect?file:///etc/passwd", "http://"),
        ("/redirect?", "redirects"),
    ],
)
def test_what_fetching_refuses(site: str, path: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        read(site + path, ImageLimits(fetch=True, max_bytes=1000, seconds=0.5), anywhere=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "{site}/a.png",
        "http://localhost:80/",
        "http://127.0.0.1/",
        "http://2130706433/",  # 127.0.0.1 as one number
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "http://user:word@1.1.1.1/",
        "http://1.1.1.1:22/",
        "ftp://1.1.1.1/a.png",
        "file:///etc/passwd",
        "http:///a",
        "http://[",
        "gopher",
        "",
    ],
)
def test_what_is_never_fetched(site: str, url: str) -> None:
    with pytest.raises(UsageError):
        read(url.format(site=site))


def test_a_redirect_inwards_is_not_followed(site: str) -> None:
    """The first address is allowed, the one it leads to is not."""
    port = site.rpartition(":")[2]
    seen: list[str] = []

    def allowed(address: Address) -> bool:
        seen.append(str(address))
        return str(address) == "127.0.0.1"

    url = f"{site}/redirect?http://127.0.0.2:{port}/a.png"
    with pytest.raises(UsageError, match="not public"):
        asyncio.run(read_image(url, FETCH, allowed))
    assert seen == ["127.0.0.1", "127.0.0.2"]


def test_nothing_is_fetched_unless_asked_for(site: str) -> None:
    with pytest.raises(UsageError, match="--fetch-images"):
        read(f"{site}/a.png", ImageLimits(), anywhere=True)
