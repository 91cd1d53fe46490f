"""What tests of models share."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.models.families import FAMILIES, tiny
from llmkit.models.rope import RopeScaling


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a tiny model of a family with a scaling, as transformers makes it."""

    def make(family: str, node: RopeScaling) -> Any:
        import transformers

        kind, changes = FAMILIES[family]
        kept = transformers.AutoModelForCausalLM.from_config

        def from_config(config: Any) -> Any:
            node.apply(config)
            return kept(config)

        with monkeypatch.context() as patch:
            patch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
            return tiny(family)

    return make
