"""How many answers are made otherwise with drafts than without: tokens, log-probabilities, ends, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        before, now = plain.told(), made.told()
        wrong: list[Answer] = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
        self.answers, self.different = self.answers + len(before), self.different + len(wrong)
        self.first = self.first or next((f"{min(wrong)} of {at}" for _ in wrong), "")
        self._add(made)

    def join(self, other: Compared) -> None:
        """Those of another."""
        self.first = self.first or other.first
        self.answers, self.different = self.answers + other.answers, self.different + other.different
        self._add(other)

    def _add(self, other: Made | Compared) -> None:
        self.leaked += other.leaked
        self.drafted, self.accepted = self.drafted + other.drafted, self.accepted + other.accepted
        self.preempted, self.hits = self.preempted + other.preempted, self.hits + other.hits


def compared(
    trial: Trial, requests: Sequence[Request], makers: Mapping[str, Make], seeds: Iterable[int]
) -> dict[str, Compared]:
    """The same requests without drafts and in as many random schedules as there are seeds, with each drafter in turn;
    counts by drafter."""
    found, plain, names = {name: Compared() for name in makers}, trial.plain(requests), list(makers)
    width = max(max(one.sampling.n, one.sampling.beams) for one in requests)
    for turn, seed in enumerate(seeds):
        name, schedule = names[turn % len(names)], Schedule.drawn(seed, width)
        made = trial.run(requests, schedule, makers[name](trial, plain, schedule))
        found[name].see(plain, made, f"{name}, schedule {seed}")
    return found
