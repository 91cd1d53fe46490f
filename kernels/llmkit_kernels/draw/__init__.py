"""Draws from softmaxes of many rows at once, each row by itself, and without a sort."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit_kernels.build import library


class Asked(NamedTuple):
    """One draw."""

    law: NDArray[np.float32]
    """(V,), end to end; its largest value is finite."""
    sharp: float
    """What differences of the law are multiplied with: 1 / temperature."""
    top_p: float
    """The share of the mass that is kept: the fewest that hold it, of equal ones the first; 1 keeps all."""
    min_p: float
    """The smallest weight that is kept, where the largest is 1."""
    at: float
    """In [0, 1): what is drawn."""


def draw(asked: Sequence[Asked]) -> list[tuple[int, float]]:
    """For each draw the place whose share of what is kept holds `at`, counted in order; and the sum of what is kept.

    Raises:
        ValueError: a law is no fp32 end to end, or empty.
        Missing: there is no compiled row here.
    """
    if any(one.law.dtype != np.float32 or not one.law.flags.c_contiguous or not one.law.size for one in asked):
        raise ValueError("a law is fp32, end to end, and not empty")
    places, masses = np.empty(len(asked), np.int64), np.empty(len(asked), np.float64)
    laws = np.array([one.law.ctypes.data for one in asked], np.uintp)
    sizes = np.array([one.law.size for one in asked], np.int64)
    kinds = {"sharp": np.float32, "top_p": np.float64, "min_p": np.float32, "at": np.float64}
    numbers = [np.array([getattr(one, name) for one in asked], kind) for name, kind in kinds.items()]
    given = (array.ctypes.data for array in (laws, sizes, *numbers, places, masses))
    _call()(*given, len(asked), torch.get_num_threads())
    return list(zip(places.tolist(), masses.tolist(), strict=True))


def likeliest(rows: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(R, V) -> (R, count): the columns of the largest of each row, the largest first and of equal ones the first.

    Raises:
        ValueError: the rows are no fp32 end to end, or have fewer columns.
        Missing: there is no compiled row here.
    """
    if rows.dtype != np.float32 or not rows.flags.c_contiguous or not 1 <= count <= rows.shape[1]:
        raise ValueError(f"{count} of {rows.shape}, {rows.dtype}: rows are fp32, end to end, and have as many columns")
    found = np.empty((len(rows), count), np.int64)
    call = _largest()
    call(rows.ctypes.data, *rows.shape, count, found.ctypes.data, min(torch.get_num_threads(), max(1, len(rows))))
    return found


@cache
def _largest() -> Any:
    call = library("draw").largest_rows
    call.argtypes, call.restype = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int], None
    return call


@cache
def _call() -> Any:
    call = library("draw").draw_rows
    call.argtypes, call.restype = [c_void_p] * 8 + [c_int64, c_int], None
    return call
