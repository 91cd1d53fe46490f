"""Places evenly apart."""

import pytest

from llmkit.data.order import spread


@pytest.mark.parametrize("length,most,places", [(5, None, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (10, 4, [0, 2, 5, 7])])
def test_places_lie_evenly_apart(length, most, places):
    assert spread(length, most) == places


@pytest.mark.parametrize("length", [7, 64, 1000])
def test_there_are_as_many_as_asked_and_none_twice(length):
    for most in range(1, length):
        places = spread(length, most)
        assert len(set(places)) == most and places == sorted(places) and places[-1] < length
