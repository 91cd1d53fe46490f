"""Methods that put virtual tokens before every row: prompt tuning, P-tuning and prefix tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.limits import PREFIX, TOKENS, Limits
from llmkit.adapters.method import Around, Method
from llmkit.core.config import Conflict, config, setting
from llmkit.core.shape import Cost, Shape

if TYPE_CHECKING:
    from torch import nn

ONE_A_ROW = "virtual tokens stand once before a row, so each sequence needs its own"
KEPT = (4, 2, 2)
"""What a layer keeps of a token in padded rows (`Cost.own`)."""


@config
class PromptTuning(Method):
    """Learned embeddings before every row (prompt tuning, arXiv:2104.08691), through peft and saved in its format."""

    limits: ClassVar[Limits] = Limits(packing=ONE_A_ROW, merge=TOKENS)
    kind: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: int = setting(default=20, least=1)
    init: Literal["vocab", "text", "random"] = "vocab"
    """What they begin as: embeddings of tokens drawn from the vocabulary, of `text`, or normal noise."""
    text: str = ""
    """For init `text`: its tokens are cut or repeated to the number of virtual ones."""

    def problems(self) -> Iterator[Conflict]:
        """A text without its init, or the other way round."""
        if (self.init == "text") != bool(self.text):
            what = (
                "begins with a text, and there is none" if self.init == "text" else f"does not use text {self.text!r}"
            )
            yield Conflict("init", what, "give text with init: text", "text")

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base; the virtual tokens change what it says from the start.

        Raises:
            ModelError: the family does not take it.
        """
        from llmkit.adapters.virtual import prompt_tuning

        adapted: nn.Module = prompt_tuning(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """n x d."""
        return Cost(self.virtual_tokens * shape.hidden, own=KEPT)


@config
class PTuning(Method):
    """Learned embeddings before every row, made by a small network (P-tuning, arXiv:2103.10385), through peft; what the
    network gives is saved, and not the network."""

    limits: ClassVar[Limits] = Limits(packing=ONE_A_ROW, merge=TOKENS)
    kind: Literal["p_tuning"] = "p_tuning"
    virtual_tokens: int = setting(default=20, least=1)
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden: int | None = setting(default=None, least=1)
    """Width of the network; the model's without it."""
    layers: int = setting(default=2, least=1)
    """Layers of an LSTM; an MLP has two hidden ones."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    """Between the layers of an LSTM."""

    def problems(self) -> Iterator[Conflict]:
        """What only an LSTM has, for an MLP."""
        for key, said in (("layers", self.layers != 2), ("dropout", self.dropout != 0.0)):
            if said and self.encoder == "mlp":
                yield Conflict(key, "is an LSTM's alone", f"use encoder: lstm, or drop {key}", "encoder")

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base; the virtual tokens change what it says from the start.

        Raises:
            ModelError: the family does not take it.
        """
        from llmkit.adapters.virtual import p_tuning

        adapted: nn.Module = p_tuning(model, self)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """n x d, and the network's."""
        d, h = shape.hidden, self.hidden or shape.hidden
        mlp = d * h + h + h * h + h + h * d + d
        gates = sum(8 * (h * (d if layer == 0 else 2 * h) + h * h + 2 * h) for layer in range(self.layers))
        lstm = gates + 4 * h * h + 2 * h + 2 * h * d + d
        return Cost(self.virtual_tokens * d + (mlp if self.encoder == "mlp" else lstm), own=KEPT)


@config
class PrefixTuning(Method):
    """Learned keys and values before those of every layer (prefix tuning, arXiv:2101.00190), through peft; of grouped
    heads those that there are."""

    limits: ClassVar[Limits] = Limits(
        packing="keys and values of the prefix stand once before a row, so each sequence needs its own",
        recompute="the prefix is handed over in a cache, which recompute cannot fill twice",
        merge=PREFIX,
    )
    kind: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: int = setting(default=20, least=1)
    projection: bool = False
    """Make them by a small network from fewer numbers; what it gives is saved, and not the network."""
    hidden: int | None = setting(default=None, least=1)
    """Width of that network; the width of a token's keys without it."""
    init: Literal["zero", "random"] = "zero"
    """Zeros, which take some attention and add nothing, or normal noise, which a trained model does not bear well."""

    def problems(self) -> Iterator[Conflict]:
        """A width of no network."""
        if self.hidden is not None and not self.projection:
            yield Conflict(
                "hidden", "is the width of the projection", "set projection: true, or drop hidden", "projection"
            )

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base; the prefix changes what it says from the start.

        Raises:
            ModelError: the family does not take it.
        """
        from llmkit.adapters.virtual import prefix_tuning

        adapted: nn.Module = prefix_tuning(model, self)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """n x 2 x layers x width of the keys, or the projection's."""
        n, width, out = self.virtual_tokens, shape.keys, 2 * shape.layers * shape.keys
        h = self.hidden or width
        return Cost(n * width + width * h + h + h * out + out if self.projection else n * out, own=(6, 2, 0))
