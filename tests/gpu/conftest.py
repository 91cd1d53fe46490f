"""What runs on a CUDA device, and on the CPU where that says anything."""

from __future__ import annotations

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


def there(name: str) -> str:
    """The device, where this machine has it."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return name
