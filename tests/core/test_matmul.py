"""How many rows would make a product faster."""

import pytest
import torch

from llmkit.core import matmul


@pytest.mark.parametrize(
    ("rows", "more"), [(255, 0), (256, 0), (257, 7), (1118, 2), (1120, 0)], ids=["few", "least", "one", "many", "full"]
)
def test_many_rows_lack_what_fills_the_last_eight(monkeypatch, rows, more):
    monkeypatch.setattr(matmul, "_onednn", lambda: print)
    assert matmul.lacking(torch.zeros(rows, 1)) == more


def test_nothing_is_lacking_where_another_row_is_live(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn", lambda: None)
    assert matmul.lacking(torch.zeros(257)) == 0
