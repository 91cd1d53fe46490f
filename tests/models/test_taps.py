"""What is read behind a model's layers is what transformers tells of them, in each family that the engine takes."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch

from llmkit.core.errors import ModelError
from llmkit.core.types import Paged, Span
from llmkit.models.decoder import Decoder
from llmkit.models.families import FAMILIES, tiny
from llmkit.models.paged import BlockStore
from llmkit.models.support import measured, said
from llmkit.models.taps import Taps
from tests.conftest import make_model
from tests.inference.exact import ready

FEW = ("Llama", "Gemma-2", "Mixtral", "Qwen3", "GPT-2", "Cohere-2")
TOKENS = [5, 9, 3, 17, 21, 4, 11]


def run(decoder: Decoder, store: BlockStore, start: int, end: int) -> None:
    span = Span(0, 0, end - start, start, (2, 0))
    tokens, places = torch.tensor([TOKENS[start:end], list(range(start, end))])
    with torch.no_grad():
        decoder.hidden(tokens, places, Paged(store, (span,)), [""])


def compared(family: str) -> None:
    model = ready(tiny(family))
    with torch.no_grad():
        told = model(torch.tensor([TOKENS]), output_hidden_states=True, use_cache=False).hidden_states
    decoder, store = Decoder(model), BlockStore(4, 4)
    which = (1, len(told) - 1)
    taps = Taps(decoder.causal, which)
    parts = []
    for start, end in ((0, 4), (4, 6), (6, 7)):
        run(decoder, store, start, end)
        parts.append(taps.take())
    for at, made in zip(which, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(made), told[at][0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FEW)
def test_states_are_those_that_the_family_tells(family: str) -> None:
    compared(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(FEW)))
def test_of_all_families(family: str) -> None:
    if not said(measured()[family]["paged"]):
        pytest.skip("the engine does not take it")
    if family in ("Gemma-3n",):  # several streams, which no row of hidden states stands for
        with pytest.raises(ModelError, match="not the hidden states of one row"):
            compared(family)
    else:
        compared(family)


def test_what_another_thread_runs_is_not_read() -> None:
    """An adapter of virtual tokens is tried while steps go on."""
    decoder, store = Decoder(ready(make_model())), BlockStore(4, 4)
    taps = Taps(decoder.causal, (1, 2))
    run(decoder, store, 0, 3)
    other = Thread(target=decoder.bank._check_embeds)
    other.start()
    other.join()
    assert [tuple(state.shape) for state in taps.take()] == [(3, 32)] * 2


def test_a_layer_that_is_not_there_is_refused_and_none_is_read_twice() -> None:
    model: Any = make_model()
    with pytest.raises(ModelError, match="layer 3 is read, and the model has 2; fix: give a head that was made for it"):
        Taps(model, (1, 3))
    decoder, store = Decoder(ready(model)), BlockStore(4, 4)
    taps = Taps(decoder.causal, (1, 2))
    run(decoder, store, 0, 3)
    assert [tuple(state.shape) for state in taps.take()] == [(3, 32)] * 2
    with pytest.raises(ModelError, match="gives nothing, not the hidden states"):
        taps.take()
    taps.close()
    run(decoder, store, 3, 5)
    with pytest.raises(ModelError):
        taps.take()
