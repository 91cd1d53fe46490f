"""What a run that goes on must have in common with the one that it was."""

import pytest

from llmkit.checkpoint.identity import compare
from llmkit.core.errors import RecipeError
from llmkit.stages.resume import _lasting


def values(deterministic, **parallel):
    return {"deterministic": deterministic, "checkpoint": {}, "out": "x", "parallel": {"virtual": 8} | parallel}


def test_the_shards_of_a_deterministic_run_stay_and_ranks_may_change():
    assert _lasting(values(False, virtual=4)) == _lasting(values(False, tensor=2))
    assert _lasting(values(True, tensor=2)) == _lasting(values(True, shard=4))
    old, new = ({"recipe": _lasting(values(True, virtual=n))} for n in (8, 4))
    with pytest.raises(RecipeError, match="parallel.virtual: was 8 .*; fix: restore it, or pass --accept"):
        compare(old, new, ())
    assert compare(old, new, ("parallel.virtual",)) == ["recipe.parallel.virtual: 8 -> 4"]
