"""What runs on a CUDA device, and on the CPU where that says anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test computes; its cuda variant has the mark `gpu`."""
    return there(str(request.param))


@pytest.fixture(params=[GPU])
def gpu(request: pytest.FixtureRequest) -> str:
    """The same of what a CPU cannot do."""
    return there(str(request.param))


def placed(cases: Iterable[tuple[Any, ...]], here: Callable[..., bool]) -> list[Any]:
    """All cases on a GPU, and on the CPU those that are `here` and nowhere else; the last parameter is `device`, which
    is indirect."""
    made = [(case, "cuda", [pytest.mark.gpu]) for case in cases]
    made += [(case, "cpu", []) for case, *_ in made if here(*case)]
    named = [(case, where, marks, "-".join([where, *map(str, case)])) for case, where, marks in made]
    return [pytest.param(*case, where, marks=marks, id=name) for case, where, marks, name in named]


def there(name: str) -> str:
    """The device, where this machine has it."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return name
