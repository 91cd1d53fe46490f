"""The LoRA family on every family of models: the properties that hold of each method."""

import pytest

from llmkit.adapters.node import Lora
from tests.adapters.properties import check, lora_count

METHODS = {
    "lora": {},
    "rslora": {"rslora": True},
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("method", METHODS)
def test_properties(method, family, tmp_path):
    check(Lora(rank=4, alpha=8, **METHODS[method]), family, tmp_path, lora_count(family, 4))
