"""How fast each rank is by itself, apart from waiting for the others, and which one is slower than the rest.

Waiting is where ranks talk: in the backward pass under ddp, in every layer under fsdp, zero 3, tensor and context. So a
rank's own time is that of its data and of its forward pass; where layers wait for each other in that as well, all ranks
look alike, and a product of matrices, which none of them waits in, tells them apart.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median_low
from typing import Any

import torch

FACTOR = 1.3
"""Times the median rank (of two, the faster one) from which a rank is slow."""
SHARE = 0.05
"""Of a step's time that it must cost more than at the median rank: what is short may well take twice as long."""
TIMES = 3
"""Reports in a row in which it must be so."""
SIDES = {"cpu": 384, "cuda": 4096}
"""Of the matrices: some milliseconds on a core, less than one on a GPU."""
SAID = {"data": "reads and packs its data in", "forward": "computes in", "product": "multiplies matrices in"}


class Pace:
    """One rank's own seconds since it was last asked, by what they were spent on."""

    def __init__(self, device: str, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.now = device, now
        self._spent = {"data": 0.0, "forward": 0.0}
        self._events: list[tuple[Any, Any]] = []
        """Beginning and end of forward passes on a GPU, which the host does not wait for."""
        self._phase, self._since, self._steps = "", 0.0, 0
        self._begun: Any = None

    def phase(self, name: str) -> None:
        """The rank enters a phase."""
        now = self.now()
        if self._phase == "data" or (self._phase == "forward" and self.device == "cpu"):
            self._spent[self._phase] += now - self._since
        self._mark(name)
        self._steps += name == "data"
        self._phase, self._since = name, now

    def _mark(self, name: str) -> None:
        if self.device != "cuda":
            return
        made: Any = torch.cuda.Event(enable_timing=True)
        if name == "forward":
            self._begun = made
            made.record()
        elif self._begun is not None:
            made.record()
            self._events.append((self._begun, made))
            self._begun = None

    def taken(self) -> dict[str, float]:
        """Seconds a step of `data` and `forward`, and those of a product now; counting begins anew. A step is over."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._spent["forward"] += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
            self._events.clear()
        steps = max(1, self._steps)
        found = {name: seconds / steps for name, seconds in self._spent.items()}
        self._spent = dict.fromkeys(found, 0.0)
        self._steps = 0
        return found | {"product": self._product()}

    def _product(self) -> float:
        side, kind = SIDES[self.device], torch.float32 if self.device == "cpu" else torch.bfloat16
        a = torch.ones(side, side, device=self.device, dtype=kind)
        best = float("inf")
        with torch.no_grad():
            for _ in range(3):
                begun = self.now()
                a @ a
                if self.device == "cuda":
                    torch.cuda.synchronize()
                best = min(best, self.now() - begun)
        return best


class Judge:
    """Who has been slow for some time; the same on all ranks, which hear the same."""

    def __init__(self) -> None:
        self._behind: Counter[tuple[int, str]] = Counter()

    def slow(self, told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """From what each rank has `taken`, with its `name` and a step's `seconds`: who is slow, and in what."""
        found, seconds = [], max(one["seconds"] for one in told)
        for what, words in SAID.items():
            middle = median_low(one[what] for one in told)
            for rank, one in enumerate(told):
                over = one[what] > FACTOR * middle
                costs = what == "product" or one[what] - middle > SHARE * seconds
                self._behind[rank, what] = self._behind[rank, what] + 1 if over and costs else 0
                if self._behind[rank, what] >= TIMES:
                    ratio = one[what] / max(middle, 1e-9)
                    said = f"{one['name']} {words} {ratio:.1f} x the time of the median rank"
                    found.append({"rank": rank, "what": what, "ratio": ratio, "said": said})
        return found
