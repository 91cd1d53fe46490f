"""What is no number is found wherever it stands, and large numbers are not taken for it."""

from __future__ import annotations

import pytest
import torch

from llmkit.models.finite import finite

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_bad_element_is_found_anywhere(dtype: torch.dtype, bad: str) -> None:
    for size in (1, 15, 1000, 70_001):
        for at in {0, size // 2, size - 1}:
            value = torch.randn(size, dtype=torch.float32).to(dtype)
            assert finite(value)
            value[at] = float(bad)
            assert not finite(value)


def test_infinities_of_both_signs_do_not_meet() -> None:
    assert not finite(torch.tensor([float("inf"), float("-inf"), 1.0]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_that_overflows_is_no_fault_of_its_elements(dtype: torch.dtype) -> None:
    value = torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(value.sum())  # the control
    assert finite(value)
    value[50, 50] = float("nan")
    assert not finite(value)


def test_whole_numbers_and_eight_bits_are_not_looked_at() -> None:
    assert finite(torch.zeros(3, dtype=torch.int8)) and finite(torch.zeros(3).to(torch.float8_e4m3fn))
    assert finite(torch.empty(0))
