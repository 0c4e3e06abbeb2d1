"""Images that a request names: data: URLs, and, where the server was told to, http(s) URLs.

Fetching what a stranger names is a way into the network the server stands in. So every address a name stands for must
be public, the connection goes to the very address that was checked, redirects are checked anew, and size, time and
type have limits. Proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from hayate.errors import UsageError

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+)((?:;[a-z0-9=-]+)*?)(;base64)?,", re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}  # no others: this is no scanner
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What the `ipaddress` of an older Python takes for global, and a cloud's own services on an address that is global.
_INSIDE = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b:1::/48", "fec0::/10", "5f00::/16", "192.0.0.0/24", "168.63.129.16"),
    )
)
_CHUNK = 65536

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class ImageLimits:
    """What images may be. fetch: whether http(s) URLs are fetched at all."""

    fetch: bool = False
    max_bytes: int = 20 * 2**20
    types: tuple[str, ...] = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
    seconds: float = 10.0  # for all of a fetch
    max_redirects: int = 3


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, by itself and where it carries an IPv4 address in it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(inner)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if any(address in network for network in _INSIDE):
        return False
    return address.is_global and not address.is_multicast


async def read_image(
    url: str, limits: ImageLimits, allowed: Callable[[Address], bool] = is_public
) -> bytes:
    """The bytes of the image that `url` names, of a type and size within `limits`; what they hold is not looked at.

    Raises:
        UsageError: it cannot be had, or must not.
    """
    if url[:5].lower() == "data:":
        return await asyncio.to_thread(_decode, url, limits)
    if not limits.fetch:
        raise UsageError(
            "image URL: this server fetches none; send the image as a data: URL, or start it with --fetch-images"
        )
    return await asyncio.to_thread(_fetch, url, limits, allowed)


def _decode(url: str, limits: ImageLimits) -> bytes:
    head = _DATA_URL.match(url[:200])
    if head is None:
        raise UsageError("image URL: it is not of the form data:image/...;base64,...")
    _check_type(head[1], limits)
    payload = url[head.end() :]
    if len(payload) > 4 * limits.max_bytes:  # before anything is copied
        raise _too_large(limits)
    try:
        data = unquote_to_bytes(payload)
        if head[3]:
            data = base64.b64decode(data, validate=True)
    except UnicodeEncodeError:
        raise UsageError("image URL: it is not valid Unicode") from None
    except binascii.Error as error:
        raise UsageError(f"image URL: its base64 is not valid ({error})") from None
    if len(data) > limits.max_bytes:
        raise _too_large(limits)
    if not data:
        raise UsageError("image URL: it is empty")
    return data


def _fetch(url: str, limits: ImageLimits, allowed: Callable[[Address], bool]) -> bytes:
    deadline = time.monotonic() + limits.seconds
    for _ in range(limits.max_redirects + 1):
        try:
            data, url = _fetch_once(url, limits, allowed, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            # Nothing of what a server inside the network says may get out.
            raise UsageError(f"image URL: it cannot be fetched ({type(error).__name__})") from None
        if data is not None:
            return data
    raise UsageError(f"image URL: more than {limits.max_redirects} redirects")


def _fetch_once(
    url: str, limits: ImageLimits, allowed: Callable[[Address], bool], deadline: float
) -> tuple[bytes | None, str]:
    """The data, or None and where to look instead."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise UsageError("image URL: only http://, https:// and data: are read")
    address, port = _resolve(parts.hostname, parts.port or _PORTS[parts.scheme], allowed)
    connection = _connect(parts.scheme, parts.hostname, address, port, deadline)
    # A timeout of the socket is for each read alone: a server may send one byte at a time.
    end = threading.Timer(max(deadline - time.monotonic(), 0), _shut, (connection.sock,))
    end.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "Accept": ", ".join(limits.types), "User-Agent": "hayate"}
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            return None, urljoin(url, response.getheader("Location", ""))
        if response.status != 200:
            raise UsageError(f"image URL: its server answered {response.status}")
        _check_type(response.getheader("Content-Type", "").partition(";")[0].strip(), limits)
        data = bytearray()
        while part := response.read1(_CHUNK):
            data += part
            if len(data) > limits.max_bytes:
                raise _too_large(limits)
        if time.monotonic() >= deadline:
            raise UsageError(f"image URL: it took more than {limits.seconds:g} seconds")
        return bytes(data), url
    finally:
        end.cancel()
        connection.close()


def _resolve(name: str, port: int, allowed: Callable[[Address], bool]) -> tuple[str, int]:
    """An address of `name`, all of whose addresses must be allowed."""
    if allowed is is_public and port not in _PORTS.values():
        raise UsageError(f"image URL: port {port} is not one that images are fetched from")
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not allowed(ipaddress.ip_address(address.partition("%")[0])):
            raise UsageError("image URL: it leads to an address that is not public")
    return addresses[0], port


def _connect(
    scheme: str, name: str, address: str, port: int, deadline: float
) -> http.client.HTTPConnection:
    """A connection to the address that was checked; the certificate must be that of the name."""
    left = max(deadline - time.monotonic(), 0.1)
    plain = socket.create_connection((address, port), timeout=left)
    connection = http.client.HTTPConnection(name, port, timeout=left)
    if scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=name)
    else:
        connection.sock = plain
    return connection


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _check_type(kind: str, limits: ImageLimits) -> None:
    if kind.lower() not in limits.types:
        raise UsageError(
            f"image URL: the type {kind!r:.60} is not one of {', '.join(limits.types)}"
        )


def _too_large(limits: ImageLimits) -> UsageError:
    return UsageError(f"image URL: the image has more than {limits.max_bytes} bytes")
