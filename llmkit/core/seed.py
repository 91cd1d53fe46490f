"""Randomness as a function of where a run is: no generator state is ever saved."""

from __future__ import annotations

import hashlib

LARGEST = 2**64 - 1
"""Of seeds: torch's generators take no more."""


def mixed(*parts: int) -> int:
    """A 63-bit number that looks random and depends on every part."""
    raw = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 1


def reseed(seed: int, step: int, micro_batch: int) -> None:
    """Sets every generator of this process for one micro-batch."""
    seeded(mixed(seed, step, micro_batch))


def seeded(number: int) -> None:
    """Sets every generator of this process."""
    import random

    import numpy
    import torch

    random.seed(number)
    numpy.random.seed(number % 2**32)
    torch.manual_seed(number)
