"""How long a step takes, by the tokens in it: measured as it goes, and never less for more of them."""

from __future__ import annotations

from bisect import bisect_left, insort

FRESH, HEAVY = 0.1, 10.0
"""The share of a new measurement in what is known, and after so many measurements it is no surer."""
FINE, COARSE = 32, 1.15
"""Numbers of tokens up to which each is measured by itself, and how far apart those beyond are."""
GUESS = 1 / 16
"""What a token more is taken to cost, as a share of the smallest step known, until a larger one was seen."""
LONGEST = 4.0
"""Times what is known: of a step that took longer, something else held the machine up."""
AGED = 32
"""Steps after which a measurement weighs half."""
SETTLE = 8
"""Measurements after which the curve is drawn again."""


class Costs:
    """Seconds of a step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Those that were measured, in order."""
        self.seconds: dict[int, float] = {}
        self.weights: dict[int, float] = {}
        self.last: dict[int, int] = {}
        """When each was seen."""
        self.seen = 0
        self.points: list[tuple[float, float]] = []
        """The curve: sizes and seconds, both rising."""

    def see(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = _size(tokens)
        new = size not in self.seconds
        if new:
            insort(self.sizes, size)
            self.seconds[size], self.weights[size] = seconds, 1.0
        else:
            known, weight = self.seconds[size], self.weights[size]
            share = max(FRESH, 1 / (weight + 1))
            self.seconds[size] = known + share * (min(seconds, LONGEST * known) - known)
            self.weights[size] = min(HEAVY, weight + 1)
        self.seen += 1
        self.last[size] = self.seen
        if new or self.seen % SETTLE == 0:
            self.points = self._curve()

    def of(self, tokens: int) -> float:
        """What a step of so many is taken to take: on the line between the points of the curve."""
        if not self.points:
            return 0.0
        size = float(_size(tokens))
        at = bisect_left(self.points, (size, 0.0))
        if at == 0:
            return self.points[0][1]
        low, least = self.points[at - 1]
        if at == len(self.points):
            return least * (1 + GUESS * (size - low)) if at == 1 else least + self._slope() * (size - low)
        high, most = self.points[at]
        return least + (size - low) / (high - low) * (most - least)

    def _slope(self) -> float:
        """Past the largest known: as between the smallest and it."""
        (first, least), (last, most) = self.points[0], self.points[-1]
        return (most - least) / (last - first)

    def _weight(self, size: int) -> float:
        return float(self.weights[size] * 0.5 ** ((self.seen - self.last[size]) / AGED))

    def _curve(self) -> list[tuple[float, float]]:
        """What is nearest to the measurements and rises: neighbours that fall are one (pool adjacent violators)."""
        pooled: list[tuple[float, float, float]] = []
        for each in self.sizes:
            size, seconds, weight = float(each), self.seconds[each], self._weight(each)
            while pooled and pooled[-1][1] >= seconds:
                before, took, weighed = pooled.pop()
                whole = weighed + weight
                size, seconds = (before * weighed + size * weight) / whole, (took * weighed + seconds * weight) / whole
                weight = whole
            pooled.append((size, seconds, weight))
        return [(size, seconds) for size, seconds, _ in pooled]


def _size(tokens: int) -> int:
    size = FINE
    if tokens <= size:
        return tokens
    while size < tokens:
        size = int(size * COARSE) + 1
    return size
