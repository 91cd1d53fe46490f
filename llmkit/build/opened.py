"""What `LLM` is made with, as a node: its arguments are read and refused as those of a recipe are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmkit.build.precision import Reading
from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import OwnEngine, Placement, Transformers
from llmkit.inference.speculation.node import Speculation
from llmkit.models.node import ModelRef, Quant

SHORT = ("tensor", "placement", "speculation")
"""Keys of the engine that are arguments of `LLM` too."""


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
    tensor: int | None = setting(default=None, least=1)
    """The generator's, in short."""
    placement: Placement | None = None
    """The same."""
    speculation: Speculation | None = None
    """The same."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        for key in SHORT:
            if getattr(self, key) is None:
                continue
            if not isinstance(self.generator, OwnEngine):
                what = f"generator {self.generator.kind} has no {key}"
                yield Conflict(key, what, "leave one of them out", "generator")
            elif getattr(self.generator, key) not in (getattr(OwnEngine(), key), getattr(self, key)):
                yield Conflict(key, f"generator has another {key}", "give it once", "generator")

    @property
    def made(self) -> OwnEngine | Transformers:
        """The generator with all that is said of it.

        Raises:
            RecipeError: its settings contradict each other.
        """
        said = {key: value for key in SHORT if (value := getattr(self, key)) is not None}
        return replace(self.generator, **said) if said else self.generator
