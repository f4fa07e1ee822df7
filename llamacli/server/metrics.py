"""Counters and histograms for Prometheus, under the names llamacli_*."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llamacli.engine.supervisor import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class _Engine(Collector):
    """Asks the engine for its figures whenever somebody looks."""

    def __init__(self, snapshot: Callable[[], Stats]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        stats = self._snapshot()
        now = stats.load
        yield GaugeMetricFamily("llamacli_slots_busy", "Sequences being computed.", now.slots_busy)
        yield GaugeMetricFamily("llamacli_queue_depth", "Requests waiting for a slot.", now.waiting)
        yield GaugeMetricFamily("llamacli_kv_cells_used", "Cells of the KV cache in use.", now.cells_used)
        yield CounterMetricFamily(
            "llamacli_prefix_hit_tokens", "Prompt tokens found computed already.", now.prefix_hit_tokens
        )
        yield CounterMetricFamily("llamacli_prefill_tokens", "Prompt tokens computed.", now.prefill_tokens)
        yield CounterMetricFamily("llamacli_decode_tokens", "Answer tokens computed.", now.decode_tokens)
        yield CounterMetricFamily(
            "llamacli_guessed_tokens", "Tokens computed on the chance that they come next.", now.guessed_tokens
        )
        yield CounterMetricFamily("llamacli_right_guesses", "Those of them that did.", now.right_guesses)
        yield CounterMetricFamily("llamacli_engine_restarts", "Times the engine died and came back.", stats.restarts)


class Metrics:
    def __init__(self, snapshot: Callable[[], Stats]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(snapshot))
        self._requests = Counter(
            "llamacli_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self._prompt_tokens = Counter("llamacli_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._completion_tokens = Counter("llamacli_completion_tokens", "Tokens of answers.", registry=self._registry)
        self.time_to_first_token = Histogram(
            "llamacli_time_to_first_token_seconds",
            "From the request to the first token of its answer.",
            buckets=_FIRST_TOKEN,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "llamacli_inter_token_seconds",
            "Between the tokens of an answer.",
            buckets=_INTER_TOKEN,
            registry=self._registry,
        )

    def request(self, route: str, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._requests.labels(route, str(status)).inc()
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)
