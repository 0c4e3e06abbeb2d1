"""/metrics: what the engine and the server do, in Prometheus' text format.

Rates are for the reader to make: throughput is `rate(hayate_generated_tokens_total[1m])`, the share
of prompt tokens found in the prefix cache `rate(hayate_prefix_cache_hits_total[5m]) /
rate(hayate_prefix_cache_queries_total[5m])`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hayate.runtime.engine_stats import EngineStats
    from hayate.runtime.outputs import RequestOutput

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
ENDPOINTS = frozenset(
    {
        "/health", "/metrics", "/version", "/tokenize", "/detokenize", "/v1/models", "/v1/completions",
        "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
        "/v1/vision/analyze",
    }
)  # fmt: skip


class Metrics:
    """The figures of one server. `stats` gives those of its engine; None while there is none."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self.requests_open = 0  # HTTP requests being answered
        self.streams_open = 0  # of these, answers being streamed
        self._registry = CollectorRegistry()
        self._registry.register(_EngineFigures(stats))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"hayate_{name}", text, registry=self._registry, buckets=buckets)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From the submission to the first token.", _SECONDS
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean of a request, after the first.", _TOKEN_SECONDS
        )
        self._duration = histogram(
            "request_duration_seconds", "From the submission to the last token.", _SECONDS
        )
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._output_length = histogram(
            "request_generated_tokens", "Tokens generated for a prompt.", _TOKENS
        )
        self._finish = Counter(
            "hayate_samples_finished",
            "Samples by why they ended.",
            ["reason"],
            registry=self._registry,
        )
        self._http = Counter(
            "hayate_http_requests",
            "HTTP requests answered; status 499: the client left first.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._http_seconds = Histogram(
            "hayate_http_request_seconds",
            "Time of an HTTP request.",
            ["endpoint"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        for name, read in (
            ("http_requests_open", lambda: self.requests_open),
            ("streams_open", lambda: self.streams_open),
        ):
            gauge = Gauge(f"hayate_{name}", "Being answered now.", registry=self._registry)
            gauge.set_function(read)

    def finished(self, path: str, status: int, seconds: float) -> None:
        """Count one HTTP request."""
        if path not in ENDPOINTS:
            path = "/v1/models" if path.startswith("/v1/models/") else "other"
        self._http.labels(path, str(status)).inc()
        self._http_seconds.labels(path).observe(seconds)

    def generated(self, output: RequestOutput) -> None:
        """Count one finished prompt and its samples."""
        figures = output.metrics
        for sample in output.outputs:
            self._finish.labels(sample.finish_reason or "abort").inc()
        self._prompt_length.observe(figures.num_prompt_tokens)
        self._output_length.observe(figures.num_generated_tokens)
        self._duration.observe(figures.total_time)
        if figures.num_generated_tokens:
            self._first_token.observe(figures.time_to_first_token)
        longest = max(len(sample.token_ids) for sample in output.outputs)
        if longest > 1:
            self._per_token.observe(figures.decode_time / (longest - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """The engine's own counters, read when somebody asks."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # do not collect to find the names

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        yield GaugeMetricFamily("hayate_ready", "1 when requests are served.", stats is not None)
        if stats is None:
            return
        pages = max(stats.num_pages, 1)
        for name, text, value in (
            ("requests_running", "Sequences being computed.", stats.num_running),
            ("requests_waiting", "Sequences in the queue.", stats.num_waiting),
            ("kv_cache_usage_ratio", "KV cache held by sequences.", stats.num_pages_used / pages),
            (
                "kv_cache_reusable_ratio",
                "KV cache held for prompts to come; free for others.",
                stats.num_pages_cached / pages,
            ),
        ):
            yield GaugeMetricFamily(f"hayate_{name}", text, value)
        for name, text, value in (
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens),
            ("generated_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("preemptions", "Sequences put back into the queue.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.num_prefix_tokens_asked),
            ("prefix_cache_hits", "Prompt tokens found.", stats.num_prefix_tokens_found),
            ("draft_tokens", "Tokens guessed by speculation.", stats.num_draft_tokens),
            ("draft_tokens_accepted", "Guesses that held.", stats.num_accepted_tokens),
        ):
            yield CounterMetricFamily(f"hayate_{name}", text, value)
