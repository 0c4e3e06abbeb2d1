"""ServerOptions: how the server is to behave. The engine's own options are `config.EngineOptions`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from hayate.errors import UsageError

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class ServerOptions:
    """What the command line says; every field has a safe default.

    Raises:
        UsageError: a value is outside its range, or an API key is empty.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    served_model_names: tuple[
        str, ...
    ] = ()  # default: the folder's name; the first is the one shown
    api_keys: tuple[str, ...] = ()  # any of these is accepted; none: no key is asked for
    allowed_origins: tuple[str, ...] = ()  # web pages of other origins that may call; "*": all
    allowed_hosts: tuple[str, ...] = ()  # values of the Host header, beside those of `hosts`
    max_body_bytes: int = 8 * 2**20
    max_requests: int = 1024  # being answered at once; others get 429
    max_samples: int = 128  # of one request: prompts times n
    fetch_images: bool = False  # images that messages name by http(s) URLs; public addresses alone
    max_images: int = 16  # of one request
    max_pixels: int = 64 * 2**20  # of all images of one request together
    max_open_pixels: int = (
        512 * 2**20
    )  # of the images of all requests being answered; others get 429
    drain_timeout: float = (
        60.0  # seconds that requests have to finish in after the first Ctrl-C or SIGTERM
    )
    json_logs: bool = False
    log_prompts: bool = False  # prompts, answers and the texts of errors in the log

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port} must be between 0 and 65535")
        for name in ("max_body_bytes", "max_requests", "max_samples", "max_images", "max_pixels"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_bytes", "_size").replace("_", "-")
                raise UsageError(f"{option} {getattr(self, name)} must be at least 1")
        if self.max_open_pixels < self.max_pixels:
            raise UsageError(
                f"--max-open-pixels {self.max_open_pixels} must be at least --max-pixels {self.max_pixels}"
            )
        if not 0 <= self.drain_timeout < float("inf"):
            raise UsageError(f"--drain-timeout {self.drain_timeout} must be 0 seconds or more")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise UsageError("an API key is empty or has characters that no HTTP header may hold")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str] | None:
        """The Host headers that are answered, without port, in lower case; None: all.

        On loopback without a key it is the only defence against web pages whose own name has been
        pointed at 127.0.0.1 (DNS rebinding).
        """
        if self.allowed_hosts:
            return frozenset(h.lower() for h in (*self.allowed_hosts, *_LOOPBACK_NAMES))
        return frozenset(_LOOPBACK_NAMES) if self.is_loopback and not self.api_keys else None
