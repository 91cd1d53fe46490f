"""A loaded model, as the members of the `generator` union take it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llmkit.build.adapters_of import Beside
from llmkit.build.engines import engine_of
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.engine import Engine
from llmkit.inference.node import OwnEngine
from llmkit.inference.writer import Files
from llmkit.models.load import Loaded


@dataclass(frozen=True)
class Here:
    """A model in this process."""

    loaded: Loaded
    trained: Any = None
    """It with an adapter in training; None where it is only read."""
    beside: Beside = Beside()
    """Adapters that may be asked for by name."""
    most: int | None = None
    """Tokens that the engine's cache need not hold more of."""
    mixed: bool = False
    """Whether products run in 16 bits under autocast, by our own doing and not by the caller's."""
    apart: str = ""
    """Where its layers lie, if that is not on one device: then nobody but the engine runs it."""
    device: str = ""
    """That computes, where `mixed` asks for it."""

    @property
    def model(self) -> Any:
        """Of transformers, perhaps with an adapter."""
        return self.loaded.model if self.trained is None else self.trained

    @property
    def tokenizer(self) -> Any:
        """The loaded model's."""
        return self.loaded.tokenizer

    def computing(self) -> AbstractContextManager[Any]:
        """Autocast, or nothing."""
        return autocast(self.device, self.mixed)

    def engine(self, how: OwnEngine) -> Engine:
        """An engine over it.

        Raises:
            ModelError: the family cannot read a paged cache, or an adapter does not fit.
            RecipeError: others read the model here too, and it is to be spread.
        """
        if how.tensor > 1 or (how.placement is not None and not self.apart):
            key = "placement" if how.placement is not None else "tensor"
            what = "the model is read whole in this process, by others than the engine too"
            raise RecipeError(what, fix=f"serve it with {key}, and use generator: openai", key=key)
        return engine_of(self.loaded, how, self.beside, self.trained, self.most)

    def check(self) -> None:
        """Nobody else is needed."""

    def close(self) -> None:
        """It goes with the last who holds it."""

    def files(self) -> Files:
        """The model's own.

        Raises:
            ModelError: what is held here is not what they hold.
        """
        if changed := self._changed():
            what = f"it {changed}, and generator vllm reads the model's files as they are"
            raise ModelError(what, fix="merge or export it first, or use generator: engine", key="generator")
        short: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return Files(self.loaded.resolved.folder, short.get(next(self.model.parameters()).dtype, "fp32"))

    def _changed(self) -> str:
        """How it differs from its files."""
        if self.trained is not None or self.loaded.resolved.base is not None:
            return "has an adapter"
        config = self.loaded.model.config
        before = type(config).from_pretrained(self.loaded.resolved.folder)
        if self.loaded.added:
            return "has new tokens"
        if hasattr(config, "quantization_config") != hasattr(before, "quantization_config"):
            return "is quantised here"
        if getattr(config, "rope_parameters", None) != getattr(before, "rope_parameters", None):
            return "has its positions scaled"
        return ""


def autocast(device: str, mixed: bool) -> AbstractContextManager[Any]:
    """Products in 16 bits on a device where they are `mixed`; else as the caller has them."""
    return torch.autocast(device, dtype=torch.bfloat16) if mixed else nullcontext()
