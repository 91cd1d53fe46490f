"""A draft head over cached keys says what it says over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit.core.types import Packed, Paged, Segment, Span
from llmkit.models.draft_head import DraftHead, shape_for
from llmkit.models.draft_run import HeadRun
from llmkit.models.paged import BlockStore
from tests.conftest import make_model

LENGTH = 23


def made(**more: Any) -> DraftHead:
    model = make_model(**more)
    torch.manual_seed(1)
    head = DraftHead(shape_for(model, 64), model.get_input_embeddings())
    for weight in head.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
    return head


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[LENGTH], [5, 6, 13, LENGTH], list(range(1, LENGTH + 1))])
def test_in_pieces_as_in_one(cuts: list[int], precision: Any) -> None:
    head = made()
    run, store = HeadRun(head, torch.device("cpu")), BlockStore(9, 4, precision)
    states = [torch.randn(LENGTH, 32) for _ in head.taps]
    tokens, places = torch.randint(448, (LENGTH,)), torch.arange(LENGTH) + 3
    parts, start, blocks = [], 0, (7, 2, 0, 5, 1, 8)
    with torch.no_grad():
        features = head.features(states)
        torch.testing.assert_close(run.features(states), features, atol=1e-5, rtol=1e-5)
        whole = head(tokens, features, places, Packed((Segment(0, 0, LENGTH),)))
        for end in cuts:
            span = Span(0, 0, end - start, start, blocks)
            here = slice(start, end)
            parts.append(run.forward(tokens[here], features[here], places[here], Paged(store, (span,))))
            start = end
        near = 3e-5 if precision is None else 0.1
        torch.testing.assert_close(torch.cat(parts), whole, atol=near, rtol=near)
        torch.testing.assert_close(run.logits(whole), head.logits(whole), atol=1e-4, rtol=1e-4)


def test_without_the_compiled_rows(uncompiled: Any) -> None:
    test_in_pieces_as_in_one([5, 6, 13, LENGTH], None)
