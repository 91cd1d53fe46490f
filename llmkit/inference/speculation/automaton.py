"""A suffix automaton that grows with a text: where its end was before, however long what repeats is.

Of Blumer et al. (Theoretical Computer Science 40, 1985), built online; states are sets of ends, and the suffix link of
the newest state is the longest suffix that came before. A token takes amortised constant time.
"""

from __future__ import annotations

from dataclasses import dataclass

NEAR = 16
"""Shorter suffixes whose newest place is noted with each token: all of them would take quadratic time where a text is
one token again and again."""


@dataclass(frozen=True)
class Match:
    """The longest suffix of a text that came before."""

    length: int
    """Tokens of it."""
    end: int
    """The place after its newest earlier occurrence, so far as it is known."""


class Automaton:
    """All substrings of the tokens that were added."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.end = [-1], [0], [0]
        """Of each state: the state of its longest shorter suffix of other ends, its longest text, and where that
        ended last."""
        self.last = 0
        self.found = Match(0, 0)

    def add(self, token: int) -> None:
        """One more at the end of the text."""
        self.text.append(token)
        new = self._state({}, self.length[self.last] + 1, len(self.text))
        at = self.last
        while at >= 0 and token not in self.next[at]:
            self.next[at][token] = new
            at = self.link[at]
        self.link[new] = 0 if at < 0 else self._target(at, token)
        self.last = new
        before = self.link[new]
        self.found = Match(self.length[before], self.end[before])
        for _ in range(NEAR):
            if before <= 0:
                break
            self.end[before] = len(self.text)
            before = self.link[before]

    def follows(self, match: Match, count: int) -> list[int]:
        """`count` tokens that came after an occurrence; past the end of the text they go on with themselves."""
        made = self.text[match.end : match.end + count]
        while made and len(made) < count:
            made += made[: count - len(made)]
        return made

    def _target(self, at: int, token: int) -> int:
        """The state to which `token` leads from `at`, of no longer texts than those of `at` with it."""
        there = self.next[at][token]
        if self.length[there] == self.length[at] + 1:
            return there
        clone = self._state(dict(self.next[there]), self.length[at] + 1, self.end[there])
        self.link[clone], self.link[there] = self.link[there], clone
        while at >= 0 and self.next[at].get(token) == there:
            self.next[at][token] = clone
            at = self.link[at]
        return clone

    def _state(self, next: dict[int, int], length: int, end: int) -> int:
        self.next.append(next)
        self.link.append(-1)
        self.length.append(length)
        self.end.append(end)
        return len(self.next) - 1
