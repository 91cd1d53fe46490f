"""Other weights for a vLLM server, by its own routes, against a small server that says what vLLM says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmkit.core.errors import ResourceError
from llmkit.inference.endpoint import Manners
from llmkit.inference.vllm_weights import VllmWeights
from tests.inference.test_generators import endpoint

_ = endpoint  # a fixture

FOLDER = Path("/models/tiny")


def test_routes_that_change_a_server_say_what_is_done_and_are_not_sent_again(endpoint: Any) -> None:
    has = {"error": {"message": "The lora adapter 'a' has already been loaded.", "code": 400}}
    to = endpoint((503, {}, {}), (400, {}, has), (200, {}, {}), (503, {}, {}), (200, {}, {}))
    weights = VllmWeights(Manners(to.url, "", 1, 3, 9.0, "rollout.vllm"), lambda _: None)
    weights.load("a", FOLDER)
    with pytest.raises(ResourceError, match=r"^rollout.vllm.url: .* answers 503, 1 times"):
        weights.reload(FOLDER)
    weights.close()
    paths = [path for path, *_ in to.asked]
    assert paths == ["/v1/load_lora_adapter"] * 2 + ["/pause?mode=wait", "/collective_rpc", "/resume"]
