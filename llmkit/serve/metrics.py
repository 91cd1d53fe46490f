"""`/metrics`: what Prometheus reads, of the server and of its engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from llmkit.serve.generated import Account
from llmkit.serve.service import Service

TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAUGES = {
    "queued": "Answers that wait for room.",
    "running": "Answers that hold blocks.",
    "blocks": "Blocks of the cache.",
    "used": "Blocks that somebody holds.",
    "version": "Of the weights.",
}
COUNTS = {
    "looked": "Tokens of prompts that were looked for in the cache.",
    "hits": "Those of them that were there.",
    "preempted": "Times that blocks were given back to be computed again.",
    "dropped": "Requests whose deadline passed before they began.",
    "late": "Answers that their deadline ended.",
    "aborted": "Requests that nobody waited for any longer.",
    "failed": "Requests that ended by a fault of their own.",
    "requests": "Requests that the engine took on.",
    "finished": "Answers that came to their end.",
    "read": "Tokens of prompts that were computed.",
    "made": "Tokens that were made.",
    "steps": "Steps.",
    "seconds": "Seconds that steps took.",
}


class Metrics:
    """Counts what passes; the engine's own account is read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self.service, self.registry = service, CollectorRegistry()
        count, time = self._count, self._time
        self.requests = count("http_requests", "Requests by route and status.", "route", "status")
        self.rejected = count("rejected", "Requests that were refused, by why.", "code")
        self.first = time("first_token_seconds", "Time to the first token.", FIRST)
        self.between = time("between_tokens_seconds", "Time between tokens.", BETWEEN)
        self.whole = time("request_seconds", "Time of a whole request.", WHOLE)
        self.prompt = count("prompt_tokens", "Tokens of prompts.", "model")
        self.cached = count("cached_tokens", "Those that were in the cache.", "model")
        self.made = count("completion_tokens", "Tokens of answers.", "model")
        self.ends = count("finished", "Requests by how they ended.", "model", "reason")
        self.registry.register(self)

    def _count(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"llmkit_{name}", what, labels, registry=self.registry)

    def _time(self, name: str, what: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"llmkit_{name}", what, ["model"], buckets=buckets, registry=self.registry)

    def ended(self, route: str, status: int) -> None:
        """A request of HTTP is over."""
        self.requests.labels(route, str(status)).inc()

    def refused(self, code: str) -> None:
        """A request was refused."""
        self.rejected.labels(code).inc()

    def done(self, account: Account) -> None:
        """A request to the model is over."""
        name = account.adapter or self.service.name
        if account.first is not None:
            self.first.labels(name).observe(account.first)
        between = self.between.labels(name)
        for seconds in account.between:
            between.observe(seconds)
        self.whole.labels(name).observe(account.seconds)
        self.prompt.labels(name).inc(account.usage.prompt)
        self.cached.labels(name).inc(account.usage.cached)
        self.made.labels(name).inc(account.usage.completion)
        self.ends.labels(name, account.finish).inc()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's account."""
        engine = self.service.engine
        yield GaugeMetricFamily("llmkit_engine_up", "Whether there is an engine.", int(engine.ready))
        yield CounterMetricFamily("llmkit_engine_restarts", "Times that it died.", engine.restarts)
        yield GaugeMetricFamily("llmkit_accepted", "Answers that are accepted.", self.service.gate.answers.total())
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"llmkit_engine_{name}", what, engine.stats.get(name, 0))
        for name, what in COUNTS.items():
            yield CounterMetricFamily(f"llmkit_engine_{name}", what, engine.stats.get(name, 0))

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
