"""The LoRA family on every family of models: the properties that hold of each method."""

import pytest

from llmkit.adapters.node import Lora
from tests.adapters.properties import FAMILIES, check, linears, lora_count

RANK = 4
METHODS = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_fa": {"lora_fa": True},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa", "pissa_niter": 4, "rslora": True},
    "olora": {"init": "olora"},
    "eva": {"init": "eva", "eva_tokens": 16},
}


def formula(method, family):
    out = sum(o for _, _, o in linears(family))
    return {"dora": lora_count(family, RANK) + out, "lora_fa": RANK * out}.get(method, lora_count(family, RANK))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_properties(method, family, tmp_path):
    check(Lora(rank=RANK, alpha=8, **METHODS[method]), family, tmp_path, formula(method, family))
