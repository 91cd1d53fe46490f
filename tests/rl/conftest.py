"""A bench whose processes end with the module."""

import pytest


@pytest.fixture(scope="module")
def bench():
    from llmkit.rl.bench import Bench

    with Bench() as made:
        yield made
