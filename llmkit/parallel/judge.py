"""Who of the ranks is to blame: from what they say of themselves, and from what they do not say any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmkit.core.errors import (
    DataError,
    LlmkitError,
    ModelError,
    PeerError,
    Problem,
    RecipeError,
    ResourceError,
    Stopped,
)
from llmkit.parallel.where import STEP, states

AGAIN = "run the same command again to go on"
OPEN = "open the model again"
"""The same of a model that answers: no command goes on with anything."""
SLACK = 5.0
"""Seconds beyond three steps that a rank may be silent, or behind."""
QUIET = 30.0
"""Seconds that a rank may be silent before a step is known to last how long."""
GRACE = 0.4
"""Seconds in which a fault of a rank is outweighed by a death, or by the main rank's own."""
HEARD = 4.0
"""Seconds since a rank said something in which it counts as one that lives."""
CPU = 0.02
"""Seconds of a processor that show life."""
ERRORS: dict[int, type[LlmkitError]] = {
    kind.code: kind for kind in (RecipeError, DataError, ModelError, ResourceError, PeerError, Stopped)
}


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end, and with which exit status."""

    code: int
    lines: tuple[str, ...]
    rank: int
    """Whose fault it is."""
    host: str = ""
    """Of that rank, with its namespace of processes."""
    pid: int = 0
    hangs: bool = False
    """It may still be there: its stack is asked for."""

    def error(self, fix: str = AGAIN) -> LlmkitError:
        """What the main thread raises for it; `fix` is how it goes on here."""
        lines = [line.replace(AGAIN, fix) for line in self.lines]
        return ERRORS.get(self.code, LlmkitError)(problems=[Problem(line) for line in lines])

    def said(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @staticmethod
    def heard(said: Mapping[str, Any]) -> Verdict:
        """From a JSON object."""
        return Verdict(**{**said, "lines": tuple(said["lines"])})


@dataclass
class Seen:
    """A rank, as the others see it. Times are the reader's own monotonic ones."""

    rank: int
    name: str
    host: str
    pid: int
    heard: float
    """When it said something last."""
    changed: float
    """When it was seen to get on last."""
    lively: float
    """When it was seen to do anything at all last."""
    last: dict[str, Any] = field(default_factory=lambda: {"phase": "start", "step": 0, "count": 0, "stack": []})
    gone: bool = False
    """It ended well, or told why."""
    lost: bool = False
    """Its connection is gone."""
    near: float = 0.0
    """Seconds that it may be silent before its first step, while it is seen at work: none on another host."""
    at_leisure: bool = False
    """It does nothing where nothing is asked of it: to stand still is no fault of it."""

    def beat(self, said: dict[str, Any], now: float) -> None:
        """It says where it is."""
        self.heard = now
        if any(said[key] != self.last.get(key) for key in ("phase", "step", "count")):
            self.changed = self.lively = now
        used = said["cpu"] - self.last.get("cpu", 0.0)
        if used > CPU or said["stack"] != self.last["stack"] or said.get("busy"):
            self.lively = now
        else:
            said = {**said, "cpu": self.last.get("cpu", 0.0)}  # little by little is life too
        self.last = said

    def moved(self, place: dict[str, Any], now: float) -> None:
        """It says that it is elsewhere."""
        self.heard = self.changed = self.lively = now
        self.last = {**self.last, **place}

    def forgive(self, now: float) -> None:
        """The reader itself was stopped: what it did not hear counts for nothing."""
        self.heard = self.changed = self.lively = now

    @property
    def at(self) -> str:
        """Its phase and step."""
        step = self.last["step"]
        return f"in {self.last['phase']}" + (f", step {step}" if step else "")

    @property
    def in_step(self) -> bool:
        """It is where every step takes about as long."""
        return self.last["phase"] in STEP and not self.last.get("alone")

    @property
    def waits(self) -> bool:
        """For the others, as far as one can see."""
        return bool(self.last.get("waiting") or self.last.get("inside"))

    @property
    def place(self) -> str:
        """The innermost frame of its stack."""
        return f", last seen at {self.last['stack'][0]}" if self.last["stack"] else ""

    def verdict(self, what: str, hangs: bool = False) -> Verdict:
        """It is to blame."""
        return Verdict(6, (f"{self.name} {what}; fix: {AGAIN}",), self.rank, self.host, self.pid, hangs)

    def died(self) -> Verdict:
        """Its process is gone."""
        return self.verdict(f"died {self.at}")

    def silent(self, now: float, median: float | None, quiet: float = QUIET) -> Verdict | None:
        """Whether it has said nothing for too long."""
        allowed = quiet if median is None else 3 * median + SLACK
        if now - self.heard <= allowed:
            return None
        if median is None and now - self.heard <= self.near and states(self.pid) & {"R", "D"}:
            return None  # it reads with Python's lock held, or gets no processor
        return self.verdict(f"has given no sign of life for {now - self.heard:.0f} s {self.at}{self.place}", True)


@dataclass(frozen=True)
class Fault:
    """What a rank told of itself."""

    rank: int
    code: int
    lines: tuple[str, ...]
    at: float


def verdict(
    seen: Mapping[int, Seen], faults: Iterable[Fault], now: float, median: float | None, quiet: float = QUIET
) -> Verdict | None:
    """Who is to blame, if anyone is: who died, else who told a fault, else who is silent, for `quiet` seconds before a
    step is known to last how long."""
    told = list(faults)
    real = [fault for fault in told if fault.code != Stopped.code]
    dead = [one for one in seen.values() if one.lost and not one.gone]
    if dead and not real:
        return dead[0].died()
    if told and now - told[0].at >= GRACE:
        first = min(real or told, key=lambda fault: (fault.rank != 0, fault.at))
        one = seen[first.rank]
        lines = tuple(f"{one.name}: {line}" for line in first.lines)
        return Verdict(first.code, lines, first.rank, one.host, one.pid)
    if told:
        return None
    silent = (one.silent(now, median, quiet) for one in seen.values() if not one.gone)
    return next(filter(None, silent), None)


def hung(seen: Mapping[int, Seen], now: float, median: float | None, patience: float) -> Verdict | None:
    """Who lives and does not get on while others wait, or which of them is behind where none gets on.

    In the phases of a step, which take equally long in each of them, three steps and some seconds are the limit.
    Elsewhere work may take any time (rows are read, a model is written): there a rank hangs that stays in one place and
    uses no processor or disk, three times as long as that phase took before and `QUIET`, or for `patience` seconds.
    """
    here = [one for one in seen.values() if not one.gone]
    if any(now - one.heard > HEARD for one in here):
        return None  # who is silent is another matter
    waiting = [one for one in here if one.waits]
    stuck = [one for one in here if not one.at_leisure and _over(one, now, median, patience)]
    behind = [one for one in stuck if one not in waiting]
    if waiting and behind:
        worst = min(behind, key=lambda one: one.changed)
        for_whom = f"while {waiting[0].name} waits {waiting[0].at}"
        return worst.verdict(f"has not moved for {now - worst.changed:.0f} s {worst.at}{worst.place}, {for_whom}", True)
    if len(here) < 2 or len(stuck) < len(here):
        return None
    worst = min(here, key=lambda one: (one.last["step"], one.last["count"]))
    others = ", ".join(f"{one.name} {one.at}" for one in here if one is not worst)
    if waiting:
        return worst.verdict(f"waits {worst.at}{worst.place} for others that wait for it: {others}", True)
    if all(now - one.lively > _limit(one, median, patience) for one in here):
        what = f"has not moved for {now - worst.changed:.0f} s {worst.at}{worst.place}, nor have the others: {others}"
        return worst.verdict(what, True)
    return None


def _over(one: Seen, now: float, median: float | None, patience: float) -> bool:
    since = one.changed if one.in_step and median is not None else one.lively
    return now - since > _limit(one, median, patience)


def _limit(one: Seen, median: float | None, patience: float) -> float:
    if one.in_step and median is not None:
        return 3 * median + SLACK
    usual = one.last.get("usual")
    return patience if usual is None else min(patience, 3 * usual + QUIET)
