"""A model as it is read: with whatever adapter its folder holds, peft's or ours."""

from __future__ import annotations

from llmkit.adapters import blocks
from llmkit.models import load as files
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef
from llmkit.models.resolve import Resolved


def load(resolved: Resolved, ref: ModelRef, how: How) -> Loaded:
    """A base model, or an adapter on its base.

    Raises:
        ModelError: naming the file, tensor or setting that does not fit.
    """
    return files.load(resolved, ref, how, {blocks.PEFT_TYPE: blocks.read})
