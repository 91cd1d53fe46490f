"""How long a step takes, by the tokens in it: measured as it goes."""

from __future__ import annotations

from bisect import bisect_left

FRESH = 0.1
"""The share of a new measurement in what is known."""
FINE, COARSE = 32, 1.15
"""Numbers of tokens up to which each is measured by itself, and how far apart those beyond are."""
GUESS = 1 / 16
"""What a token more is taken to cost, as a share of the smallest step known, until a larger one was seen."""


class Costs:
    """Seconds of a step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Those that were measured, in order."""
        self.seconds: dict[int, float] = {}

    def see(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = _size(tokens)
        if size not in self.seconds:
            self.sizes.insert(bisect_left(self.sizes, size), size)
            self.seconds[size] = seconds
            return
        known = self.seconds[size]
        seconds = min(seconds, 4 * known)  # something else held the machine up
        self.seconds[size] = known + FRESH * (seconds - known)

    def of(self, tokens: int) -> float:
        """What a step of so many is taken to take: on the line between those that are known."""
        if not self.sizes:
            return 0.0
        size = _size(tokens)
        at = bisect_left(self.sizes, size)
        if at < len(self.sizes) and self.sizes[at] == size:
            return self.seconds[size]
        if at == 0:
            return self.seconds[self.sizes[0]]
        low = self.sizes[at - 1]
        if at == len(self.sizes):
            return self.seconds[low] * (1 + GUESS * (size - low))
        high = self.sizes[at]
        part = (size - low) / (high - low)
        return self.seconds[low] + part * max(0.0, self.seconds[high] - self.seconds[low])


def _size(tokens: int) -> int:
    size = FINE
    if tokens <= size:
        return tokens
    while size < tokens:
        size = int(size * COARSE) + 1
    return size
