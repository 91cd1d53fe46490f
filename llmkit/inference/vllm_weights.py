"""Other weights for a running `vllm serve`, by its own routes: an adapter under a name, or all weights in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.core.errors import LlmkitError, ModelError
from llmkit.inference.endpoint import Endpoint, Manners
from llmkit.inference.request import RequestError

LORA = "start vllm serve with --enable-lora, --max-lora-rank as asked, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
LOADED = "already been loaded"
"""How vLLM refuses an adapter under a name that it has."""
WHOLE = "start vllm serve with VLLM_SERVER_DEV_MODE=1"


class VllmWeights:
    """What a server is told of weights that lie in a folder which it can read too."""

    def __init__(self, manners: Manners, sleep: Callable[[float], None] = time.sleep) -> None:
        self.routes = Endpoint(manners, sleep)
        root = manners.url.rstrip("/").removesuffix("/v1")
        self.others = Endpoint(replace(manners, url=root, tries=1), sleep)
        """Those that are no OpenAI's: sent once, for one that was not answered may be under way."""

    def load(self, name: str, folder: Path) -> None:
        """Requests may name this adapter from now on. It may be sent again: a server that has it says so.

        Raises:
            ModelError: the server does not take it.
        """
        _told(self.routes, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, LORA, LOADED)

    def drop(self, name: str) -> None:
        """Nobody asks for this adapter any more.

        Raises:
            ModelError: the server does not know it.
        """
        _told(self.routes, "unload_lora_adapter", {"lora_name": name}, LORA)

    def reload(self, folder: Path) -> None:
        """All weights are those of a folder: what has begun ends first, and what is cached is forgotten. The server is
        never left paused.

        Raises:
            ModelError: the server does not take them.
        """
        change = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            _told(self.others, "pause?mode=wait", {}, WHOLE)
            _told(self.others, "collective_rpc", change, WHOLE)
        except BaseException:
            with suppress(LlmkitError):  # what happened first is told
                _told(self.others, "resume", {}, WHOLE)
            raise
        _told(self.others, "resume", {}, WHOLE)

    def close(self) -> None:
        """Nothing more is said."""
        self.routes.close()
        self.others.close()


def _told(endpoint: Endpoint, route: str, body: Mapping[str, Any], fix: str, done: str = "") -> None:
    """`done`: what it says where this was done before."""
    try:
        endpoint.post(route, body, lambda _: None)
    except RequestError as cause:
        if done and done in cause.problems[0].what:
            return
        raise ModelError(cause.problems[0].what, fix=fix, key="rollout.vllm") from cause
