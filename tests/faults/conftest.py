"""What tests of faults share."""

import signal

import pytest

from llmkit.checkpoint import state
from tests.faults import go, in_child, killed_after, sft, whole


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory):
    """(rows, the folder of an uninterrupted run over them): do not write into them."""
    return whole(tiny, tmp_path_factory.mktemp("world"))


@pytest.fixture
def half(tiny, world, tmp_path):
    """The folder of the same run, killed after its checkpoint at step 4."""
    out = tmp_path / "half"
    assert in_child(lambda: killed_after(4, lambda: go(sft(tiny, world[0], out)))) == -signal.SIGKILL
    assert state.steps(out / "checkpoints") == [4, 2]
    return out
