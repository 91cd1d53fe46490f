"""Runs of a few ranks inside of a kit of many: each rank of the kit starts and watches a child of its own.

The ranks of the kit are a group that never touches the devices. They look at their children together, several times a
second, so that all of them know what became of each, and a signal is sent at one moment by all clocks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.cli.acceptance.bars import Bars
from llmkit.core.peers import Peers
from llmkit.core.ranks import Ranks, free_port

COMMAND = (sys.executable, "-m", "llmkit")
TURN = 0.05
"""Seconds between looks."""


@dataclass(frozen=True)
class Strike:
    """A signal to some of a trial's ranks, as soon as the main one sees that it is time."""

    when: Callable[[], bool]
    number: signal.Signals
    ranks: range
    within: float
    """Seconds after it in which the others must have ended, or are killed."""


@dataclass(frozen=True)
class Ended:
    """What became of a trial: the same on every rank of the kit."""

    codes: list[int]
    """Of each rank; a signal's number is negative."""
    after: list[float]
    """Seconds from the strike until each one's end."""
    said: list[str]
    """The error lines of each rank."""
    struck: bool
    hung: list[int]
    """Ranks that had to be killed."""

    @property
    def well(self) -> bool:
        """Whether all of them exited with 0."""
        return not any(self.codes)

    @property
    def why(self) -> str:
        """The first error that a rank told, or how they ended."""
        told = next(filter(None, self.said), "")
        return told or f"exit statuses {', '.join(map(str, self.codes))}, and not a word"


@dataclass
class Kit:
    """What the parts of a proof work with: called by all ranks alike."""

    peers: Peers
    work: Path
    """On a disk that all ranks share."""
    device: str
    bars: Bars
    recipe: Path | None = None
    """The user's; without it one is made on the spot."""
    overrides: Sequence[str] = ()
    command: Sequence[str] = COMMAND
    trials: int = 0
    told: dict[str, Any] = field(default_factory=dict)
    """What a part leaves for a later one; on the main rank."""

    @property
    def world(self) -> int:
        """Ranks there are."""
        return self.peers.ranks.world

    def main(self, work: Callable[[], Any]) -> Any:
        """A JSON value that the main rank makes, on every rank."""
        with self.peers.alone("proof"):
            made = work() if self.peers.ranks.main else None
        return self.peers.share(made)

    def trial(self, words: Sequence[str], world: int, strike: Strike | None = None) -> Ended:
        """Runs `llmkit WORDS` on the first `world` ranks, to its end or to that of its time."""
        self.trials += 1
        port = self.peers.share(free_port("") if self.peers.ranks.main else 0)
        own = self.work / "said" / f"{self.trials}-{self.peers.ranks.rank}.txt"
        child = self._begin(words, world, port, own) if self.peers.ranks.rank < world else None
        try:
            return self._watched(child, own, world, strike)
        finally:
            if child is not None and child.poll() is None:
                child.kill()
                child.wait()

    def said(self) -> str:
        """What the main rank's child of the last trial printed."""
        return (self.work / "said" / f"{self.trials}-0.txt").with_suffix(".out").read_text()

    def _begin(self, words: Sequence[str], world: int, port: int, own: Path) -> subprocess.Popen[bytes]:
        own.parent.mkdir(parents=True, exist_ok=True)
        mine, host = self.peers.ranks, os.environ.get("MASTER_ADDR", "127.0.0.1")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        here = max(1, min(mine.here, world - (mine.rank - mine.local)))
        env = kept | Ranks(mine.rank, world, mine.local, here).environment(port, host)
        with own.open("wb") as heard, own.with_suffix(".out").open("wb") as printed:
            return subprocess.Popen([*self.command, *words], env=env, stdout=printed, stderr=heard)

    def _watched(self, child: subprocess.Popen[bytes] | None, own: Path, world: int, strike: Strike | None) -> Ended:
        mine, code, after, hung = self.peers.ranks.rank, 0 if child is None else None, 0.0, False
        begun = time.monotonic()
        struck = 0.0
        while True:
            now = time.monotonic()
            over = now - begun > self.bars.trial.limit
            if strike and struck:
                over = over or now - struck > strike.within
            ready = bool(strike and not struck and self.peers.ranks.main and strike.when())
            told = self.peers.gather([code, self.peers.ranks.main and over, ready])
            if all(one[0] is not None for one in told):
                break
            if told[0][2] and strike:
                struck = time.monotonic()
                if child is not None and mine in strike.ranks and child.poll() is None:
                    child.send_signal(strike.number)
            if told[0][1] and child is not None and child.poll() is None:
                hung = True
                child.kill()
            if code is None and child is not None and (code := child.poll()) is not None:
                after = time.monotonic() - struck if struck else 0.0
            time.sleep(TURN)
        mark = [code, after, _errors(own) if child is not None else "", hung, bool(struck)]
        whole = self.peers.gather(mark)[:world]
        codes, times, said, left, hit = (list(each) for each in zip(*whole, strict=True))
        return Ended(codes, times, said, hit[0], [rank for rank, one in enumerate(left) if one])


def _errors(path: Path) -> str:
    """The first line of an error, without what stands before it; nothing where there is none."""
    lines = path.read_text(errors="replace").splitlines()
    told = [line.partition("error: ")[2] for line in lines if line.startswith("llmkit: error: ")]
    return next(iter(told), "")
