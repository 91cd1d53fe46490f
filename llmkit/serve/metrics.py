"""`/metrics`: what Prometheus reads, of the server and of its engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from llmkit.serve.foretold import Categories
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
SPECULATION = {
    "drafted_tokens": ("drafted", "Drafts that were looked at."),
    "accepted_tokens": ("accepted", "Those of them that were what was chosen."),
    "drafting_seconds": ("drafting", "Seconds that drafting took."),
    "verifying_seconds": ("verifying", "Seconds of steps in which drafts were looked at, but for drafting."),
}
"""By who drafts: the name of a metric, and which of the engine's counts it is."""
CATEGORY = {
    "requests": "Requests of a category (metadata.category).",
    "completion_tokens": "Tokens of their answers.",
    "steps": "Steps that their answers took, each answer's by itself.",
    "drafted_tokens": "Drafts of their answers that were looked at.",
    "accepted_tokens": "Those of them that are in the answers.",
    "seconds": "Seconds from an answer's first token to its end.",
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
        self.categories = Categories(service.bounds.categories)
        self.by_category = {name: count(f"category_{name}", what, "category") for name, what in CATEGORY.items()}
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
        self._categorised(account)

    def _categorised(self, account: Account) -> None:
        usage, name = account.usage, self.categories.of(account.category)
        counts: dict[str, float] = {"requests": 1, "completion_tokens": usage.completion}
        counts |= {"steps": usage.steps, "drafted_tokens": usage.drafted}
        counts |= {"accepted_tokens": usage.accepted, "seconds": account.seconds - (account.first or account.seconds)}
        for key, value in counts.items():
            self.by_category[key].labels(name).inc(value)

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
        if drafter := engine.facts.get("speculation"):
            yield from _speculation(str(drafter), engine.stats)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)


def _speculation(drafter: str, stats: Mapping[str, Any]) -> Iterator[CounterMetricFamily]:
    """What drafts were worth: in all, and how often the first, the second ... of a look was kept."""
    kept: Sequence[int] = stats.get("kept", ())
    what = "Of what drafts, how many failed and were given up: answers go on without."
    fallen = CounterMetricFamily("llmkit_speculation_failed_drafters", what, None, ["drafter"])
    fallen.add_metric([drafter], len(stats.get("fallen", ())))
    yield fallen
    looks = CounterMetricFamily(
        "llmkit_speculation_drafts", "Times that an answer's drafts were looked at.", None, ["drafter"]
    )
    looks.add_metric([drafter], sum(kept))
    yield looks
    for name, (key, what) in SPECULATION.items():
        family = CounterMetricFamily(f"llmkit_speculation_{name}", what, None, ["drafter"])
        family.add_metric([drafter], stats.get(key, 0))
        yield family
    what = "Drafts that were what was chosen, by their place among an answer's drafts."
    places = CounterMetricFamily("llmkit_speculation_accepted_tokens_per_pos", what, None, ["drafter", "position"])
    for at in range(max((at for at, count in enumerate(kept) if count), default=0)):
        places.add_metric([drafter, str(at)], sum(kept[at + 1 :]))
    yield places
