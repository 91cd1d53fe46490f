"""How many answers are made otherwise with drafts than without: tokens, log-probabilities, ends, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmkit.cli.speculation.drafters import Make
from llmkit.cli.speculation.trial import Answer, Made, Schedule, Trial
from llmkit.inference.request import Request


@dataclass
class Compared:
    """Counts over schedules."""

    answers: int = 0
    different: int = 0
    first: str = ""
    """Which answer was the first to differ."""
    leaked: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    hits: int = 0
    """Tokens of prompts that were found in the cache."""

    def see(self, plain: Made, made: Made, at: str) -> None:
        """One schedule more."""
        before, now, stats = plain.told(), made.told(), made.stats
        wrong: list[Answer] = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
        self.answers, self.different = self.answers + len(before), self.different + len(wrong)
        self.first = self.first or next((f"{min(wrong)} of {at}" for _ in wrong), "")
        self.leaked += made.leaked
        if stats is not None:
            self.drafted, self.accepted = self.drafted + stats.drafted, self.accepted + stats.accepted
            self.preempted, self.hits = self.preempted + stats.preempted, self.hits + stats.hits

    def join(self, other: Compared) -> None:
        """Those of another."""
        self.first = self.first or other.first
        for name in ("answers", "different", "leaked", "drafted", "accepted", "preempted", "hits"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def compared(
    trial: Trial, requests: Sequence[Request], makers: Iterable[tuple[str, Make]], seeds: Iterable[int]
) -> Compared:
    """The same requests without drafts and in as many random schedules as there are seeds, with each drafter in
    turn."""
    found, plain, some = Compared(), trial.plain(requests), list(makers)
    width = max(max(one.sampling.n, one.sampling.beams) for one in requests)
    for turn, seed in enumerate(seeds):
        name, make = some[turn % len(some)]
        made = trial.run(requests, Schedule.drawn(seed, width), make(trial, plain, seed))
        found.see(plain, made, f"{name}, schedule {seed}")
    return found
