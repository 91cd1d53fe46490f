"""A heap of which anything can be dropped: thousands wait, and any of them may leave."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
Key = tuple[float, ...]


class Heap(Generic[T]):
    """Items by their keys; of equal ones that which came first. Each verb takes O(log n), over many calls."""

    def __init__(self) -> None:
        self.entries: list[tuple[Key, int, T]] = []
        self.tickets: dict[T, int] = {}
        """Of those that are here; an entry with another ticket is of one that was dropped."""
        self.given = 0

    def __len__(self) -> int:
        return len(self.tickets)

    def __contains__(self, item: T) -> bool:
        return item in self.tickets

    def push(self, key: Key, item: T) -> None:
        """One more; one that is here already gets this key instead of its own."""
        self.given += 1
        self.tickets[item] = self.given
        heappush(self.entries, (key, self.given, item))
        self._sweep()

    def drop(self, item: T) -> None:
        """Takes an item out, wherever it stands.

        Raises:
            KeyError: it is not here.
        """
        del self.tickets[item]
        self._sweep()

    def first(self) -> tuple[Key, T] | None:
        """That with the least key; it stays."""
        while self.entries and self.tickets.get(self.entries[0][2]) != self.entries[0][1]:
            heappop(self.entries)
        return (self.entries[0][0], self.entries[0][2]) if self.entries else None

    def _sweep(self) -> None:
        """Dropped entries are never more than those that are here, and a few."""
        if len(self.entries) > 2 * len(self.tickets) + 16:
            self.entries = [entry for entry in self.entries if self.tickets.get(entry[2]) == entry[1]]
            heapify(self.entries)
