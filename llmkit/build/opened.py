"""What `LLM` is made with, as a node: its arguments are read and refused as those of a recipe are."""

from __future__ import annotations

from llmkit.build.precision import Reading
from llmkit.core.config import config, setting
from llmkit.inference.node import OwnEngine, Transformers
from llmkit.models.node import ModelRef, Quant


@config
class Opened:
    """A model that is opened to be asked."""

    model: ModelRef
    quant: Quant | None = None
    """How it is held; left out, an adapter's base is held as it was in training."""
    generator: OwnEngine | Transformers = OwnEngine()
    """What makes its text."""
    precision: Reading = "auto"
    """`auto` is fp32 on CPU and bf16 on GPUs."""
    seed: int = setting(default=0, least=0)
    """Added to the seeds of what it is asked."""
