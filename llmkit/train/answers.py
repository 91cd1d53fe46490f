"""The `answers` union of what learns to draft: whose answers it learns from."""

from __future__ import annotations

from typing import Literal

from llmkit.core.config import config, setting
from llmkit.inference.node import OwnEngine
from llmkit.inference.sampling import Sampling


@config
class Own:
    """The model's own, made anew for each prompt of the data: what drafts for a model is to know what that says."""

    kind: Literal["own"] = "own"
    sampling: Sampling = setting(default_factory=lambda: Sampling(max_tokens=256))
    """How they are chosen, as in use: greedy where nothing is said."""
    generator: OwnEngine = OwnEngine()
    """What makes them."""


@config
class Given:
    """Those of the rows."""

    kind: Literal["given"] = "given"


Answers = Own | Given
