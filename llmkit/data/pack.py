"""Laying sequences in rows: pure lists in, pure lists out."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of indices into `lengths`: each goes, in order, into the first row with room, in O(n log n).

    One that is longer than `capacity` gets a row of its own.
    """
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)  # a heap-shaped tree: leaf `size + row`, and over two the larger of their rooms
    rows: list[list[int]] = []
    for index, length in enumerate(min(length, capacity) for length in lengths):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(index)
        room[node] -= length
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
