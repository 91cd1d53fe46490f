"""The recipe's `model` and `quant` nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from llmkit.core.config import Conflict, Later, config, setting
from llmkit.core.errors import ModelError
from llmkit.models.rope import RopeScaling

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass(frozen=True)
class Head:
    """A classification head: what it tells apart."""

    task: Literal["sequence", "token"]
    labels: tuple[str, ...]
    seed: int = 0
    """Of its first weights, where it is new."""


@config
class ModelRef:
    """Which model, and how it is read."""

    _short: ClassVar[str] = "name"
    name: str
    """An alias, a Hub id, a Hugging Face folder, a PEFT adapter folder, or a run's folder."""
    revision: str | None = None
    """A commit, tag or branch of a Hub id; an alias pins its own."""
    attention: Literal["auto", "sdpa", "flash", "flex", "eager"] = "auto"
    """The attention kernel; one that is asked for and missing is an error."""
    template: str | None = None
    """A Jinja chat template that replaces the tokenizer's own: a file, or chatml, llama3, mistral, gemma, phi3, zephyr
    or alpaca."""
    add_tokens: tuple[str, ...] = ()
    """New tokens that are recognised wherever they stand in a text. A new token's row starts as the mean of all others;
    it is trained and saved with a LoRA, or with the model where every weight is trained."""
    add_special_tokens: tuple[str, ...] = ()
    """New tokens of the chat template: in the text of rows and prompts they are plain text, and decoding leaves them
    out."""
    rope: RopeScaling | None = None
    """RoPE scaling; left out, an adapter's base is scaled as it was in training."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        for token in self.add_tokens:
            if token in self.add_special_tokens:
                what = f"{token!r} is to be plain and special"
                yield Conflict("add_tokens", what, "name it in one of the two", "add_special_tokens")
        for key in ("add_tokens", "add_special_tokens"):
            given = getattr(self, key)
            for token in given:
                if not token.strip():
                    yield Conflict(key, f"{token!r} is blank", "give text")
                elif given.count(token) > 1:
                    yield Conflict(key, f"{token!r} is there twice", "name it once")


@config
class NoQuant:
    """The base model is held at the recipe's precision."""

    weight_bytes: ClassVar[float] = 0.0
    kind: Literal["none"] = "none"

    def config(self, compute: torch.dtype) -> None:
        """Nothing for transformers to do."""


@config
class Nf4:
    """The frozen base is held in 4-bit NormalFloat blocks of 64 (QLoRA, arXiv:2305.14314), by bitsandbytes."""

    weight_bytes: ClassVar[float] = 0.6
    kind: Literal["bnb_nf4"] = "bnb_nf4"
    double: bool = True
    """Quantise the block scales too (0.37 bits a weight less)."""

    def config(self, compute: torch.dtype) -> Any:
        """For transformers: products and scales in `compute`.

        Raises:
            ModelError: bitsandbytes is missing.
        """
        return _bitsandbytes(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=compute,
        )


@config
class Int8:
    """The frozen base is held in 8-bit rows, its outliers in fp16 (LLM.int8(), arXiv:2208.07339), by bitsandbytes."""

    weight_bytes: ClassVar[float] = 1.1
    kind: Literal["bnb_int8"] = "bnb_int8"
    threshold: float = setting(default=6.0, least=0.0)
    """Activations above it take the outlier path; 0 turns it off."""

    def config(self, compute: torch.dtype) -> Any:
        """For transformers; products are in the type of what comes in.

        Raises:
            ModelError: bitsandbytes is missing.
        """
        return _bitsandbytes(load_in_8bit=True, llm_int8_threshold=self.threshold)


def _bitsandbytes(**settings: Any) -> Any:
    try:
        import bitsandbytes  # noqa: F401 - asked for its presence
        from transformers import BitsAndBytesConfig
    except ImportError as missing:
        raise ModelError(
            f"quant needs bitsandbytes ({missing})", fix="pip install bitsandbytes", key="quant.kind"
        ) from missing
    return BitsAndBytesConfig(**settings)


Quant = Annotated[NoQuant | Nf4 | Int8, Later(("w8a8", "w4a8", "w8a16", "w4a16"))]
