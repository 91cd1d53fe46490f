"""RoPE scaling: how rotary positions go past the length that a model was trained on. The verb is `apply`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from llmkit.core.config import Conflict, config, setting
from llmkit.core.errors import ModelError

OURS = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""The kinds here, as transformers calls them too: one that a model has may be replaced by another."""
GLOBAL = "full_attention"
"""Where a model turns its layers by type (Gemma 3), those of the window stay as they are."""
SCALES = (
    *("type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
    *("mscale_all_dim", "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "alpha"),
)
"""What a scaling says beside its kind."""


@config
class Scaling:
    """What the kinds share."""

    _keeps: ClassVar[bool] = False
    """The length that is written stays the trained one, as the table is relative to it."""
    kind: str = ""
    factor: float = setting(least=1.0)
    """How many times the trained length the model shall take."""
    original_max_position_embeddings: int | None = setting(default=None, least=1)
    """The trained length; left out, what the model says."""
    theta: float | None = setting(default=None, above=0.0)
    """The base of the rotations, in the place of the model's own."""
    replace: bool = False
    """Take the place of a scaling that the model has already."""

    def apply(self, config: Any) -> None:
        """Writes it into a configuration of transformers."""
        scale(config, self, {})


@config
class Linear(Scaling):
    """Positions are divided by `factor` (position interpolation, arXiv:2306.15595)."""

    kind: Literal["linear"] = "linear"


@config
class Dynamic(Scaling):
    """The base grows with the length of each sequence (NTK-aware); up to the trained length nothing changes."""

    _keeps: ClassVar[bool] = True
    kind: Literal["dynamic"] = "dynamic"
    factor: float = setting(least=1.0)
    """How fast the base grows with the length."""


@config
class Yarn(Scaling):
    """Slow rotations are stretched, fast ones kept, and attention is sharpened (YaRN, arXiv:2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    attention_factor: float | None = setting(default=None, above=0.0)
    """What cosines and sines are multiplied by; left out, 0.1 ln(factor) + 1."""
    beta_fast: float = setting(default=32.0, above=0.0)
    """Pairs that turn more often than this over the trained length are kept."""
    beta_slow: float = setting(default=1.0, above=0.0)
    """Pairs that turn less often than this are stretched by the whole factor."""
    mscale: float | None = setting(default=None, above=0.0)
    """With `mscale_all_dim`: the attention factor is the ratio of the two scales (DeepSeek)."""
    mscale_all_dim: float | None = setting(default=None, above=0.0)
    truncate: bool = True
    """Round the range between the two betas to whole pairs."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.beta_fast <= self.beta_slow:
            yield Conflict("beta_fast", "is not more than beta_slow", "give the larger one here", "beta_slow")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            lone, other = ("mscale", "mscale_all_dim") if self.mscale_all_dim is None else ("mscale_all_dim", "mscale")
            yield Conflict(lone, "says nothing without the other", f"give {other} too, or drop {lone}", other)
        if self.attention_factor is not None and self.mscale is not None:
            what = "both say what attention is multiplied by"
            yield Conflict("attention_factor", what, "keep one of the two", "mscale")

    def apply(self, config: Any) -> None:
        """Writes it into a configuration of transformers."""
        if not self.truncate and rotations(config) is not config.rope_parameters:
            what = f"{config.model_type} turns its layers by type, and transformers rounds there always"
            raise ModelError(what, fix="drop model.rope.truncate", key="model.rope.truncate")
        said = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": None if self.truncate else False}
        said |= {"mscale": self.mscale, "mscale_all_dim": self.mscale_all_dim}
        scale(config, self, said | {"attention_factor": self.attention_factor})


@config
class LongRope(Scaling):
    """Each pair of dimensions has its own factor, one set below the trained length and one above (arXiv:2402.13753)."""

    kind: Literal["longrope"] = "longrope"
    long_factor: tuple[float, ...]
    """What each pair's frequency is divided by in sequences longer than the trained length."""
    short_factor: tuple[float, ...] | None = None
    """The same in shorter ones; left out, 1 for each."""
    original_max_position_embeddings: int | None = setting(default=None, least=2)
    """The trained length; left out, what the model says."""
    attention_factor: float | None = setting(default=None, above=0.0)
    """What cosines and sines are multiplied by; left out, sqrt(1 + ln(factor) / ln(trained length))."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        for name, given in (("long_factor", self.long_factor), ("short_factor", self.short_factor)):
            if given is not None and not all(value > 0 for value in given):
                yield Conflict(name, "holds a factor that is not above 0", "give positive numbers")
        if self.short_factor is not None and len(self.short_factor) != len(self.long_factor):
            what = f"has {len(self.short_factor)} factors, not {len(self.long_factor)}"
            yield Conflict("short_factor", what, "give one for each pair of dimensions", "long_factor")

    def apply(self, config: Any) -> None:
        """Writes it into a configuration of transformers."""
        width = int(head_size(config) * (rotations(config).get("partial_rotary_factor") or 1.0))
        if len(self.long_factor) != width // 2:
            what = (
                f"has {len(self.long_factor)} factors, and {config.model_type} turns {width // 2} pairs of dimensions"
            )
            raise ModelError(what, fix="give one for each pair", key="model.rope.long_factor")
        said = {"long_factor": list(self.long_factor), "attention_factor": self.attention_factor}
        said["short_factor"] = list(self.short_factor or [1.0] * len(self.long_factor))
        scale(config, self, said)


@config
class Llama3(Scaling):
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1, arXiv:2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = setting(above=1.0)
    """What long waves are stretched by, and how many times the trained length the model shall take."""
    low_freq_factor: float = setting(default=1.0, above=0.0)
    """Waves longer than the trained length over this are stretched."""
    high_freq_factor: float = setting(default=4.0, above=0.0)
    """Waves shorter than the trained length over this are kept."""
    max_position_embeddings: int | None = setting(default=None, least=1)
    """The length that the model shall take, where it is not `factor` times the trained one (Llama 3.1: 8 and 16)."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.high_freq_factor <= self.low_freq_factor:
            fix = "give the larger one here"
            yield Conflict("high_freq_factor", "is not more than low_freq_factor", fix, "low_freq_factor")
        most, trained = self.max_position_embeddings, self.original_max_position_embeddings
        if most is not None and trained is not None and most <= trained:
            what, fix = f"{most} is not more than the trained length", "give the larger one here"
            yield Conflict("max_position_embeddings", what, fix, "original_max_position_embeddings")

    def apply(self, config: Any) -> None:
        """Writes it into a configuration of transformers."""
        scale(config, self, {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor})
        config.max_position_embeddings = self.max_position_embeddings or config.max_position_embeddings


RopeScaling = Linear | Dynamic | Yarn | LongRope | Llama3


def rotations(config: Any) -> dict[str, Any]:
    """What a configuration says of the rotations of its global attention.

    Raises:
        ModelError: it has none.
    """
    said = getattr(config, "rope_parameters", None) or {}
    nested = any(isinstance(held, dict) for held in said.values())
    own: dict[str, Any] | None = said.get(GLOBAL) if nested else said
    if not own or getattr(config, "alibi", False):  # Falcon: one of the two
        what = f"{config.model_type} has no RoPE that could be scaled"
        raise ModelError(what, fix="drop model.rope", key="model.rope")
    return own


def head_size(config: Any) -> int:
    """The width of a head of queries in global attention."""
    part = _of_global(config)
    return int(getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads)


def _of_global(config: Any) -> Any:
    """What a configuration says of its layers of global attention, where layers differ (Gemma 4)."""
    return config.per_layer_config[GLOBAL] if getattr(config, "is_heterogeneous", False) else config


def scale(config: Any, node: Scaling, said: Mapping[str, Any]) -> None:
    """Writes a scaling into `config.rope_parameters`, and the length that it reaches; `said` is what its kind adds.

    Raises:
        ModelError: there is no RoPE, or it is scaled already.
    """
    own = rotations(config)
    trained = _trained(config, node, own)
    if getattr(_of_global(config), "head_dim", 0) is None:  # transformers' tables want a number
        config.head_dim = head_size(config)
    nested = own is not config.rope_parameters
    own = {name: value for name, value in own.items() if name not in SCALES}  # a new one: it may be a class's default
    own |= {"rope_type": node.kind, "factor": node.factor, **{k: v for k, v in said.items() if v is not None}}
    if node.theta is not None:
        own["rope_theta"] = node.theta
    config.rope_parameters = {**config.rope_parameters, GLOBAL: own} if nested else own
    if node.kind in ("yarn", "longrope", "llama3"):
        own["original_max_position_embeddings"] = trained
        if hasattr(config, "original_max_position_embeddings"):  # Phi-3: transformers believes this one
            config.original_max_position_embeddings = trained
    # the table of `dynamic` is relative to the trained length, which transformers reads here
    config.max_position_embeddings = trained if node._keeps else round(node.factor * trained)
    try:
        config.validate_rope()
    except (ValueError, KeyError, TypeError) as cause:  # Phi-3 loads with `longrope` and no other
        what = f"{config.model_type} does not take RoPE `{node.kind}`: {cause.args[0]}"
        raise ModelError(what, fix="use a kind that it takes", key="model.rope.kind") from cause


def reach(config: Any, node: Scaling) -> int:
    """The length that a configuration goes to under the scaling that is written in it."""
    length = int(config.max_position_embeddings)
    return round(node.factor * length) if node._keeps else length


def _trained(config: Any, node: Scaling, own: Mapping[str, Any]) -> int:
    """The trained length."""
    kind = own.get("rope_type", "default")
    if kind != "default":
        what = f"{config.model_type} has RoPE `{kind}` of its own"
        if kind not in OURS:
            raise ModelError(f"{what}, which is not scaled any further", fix="drop model.rope", key="model.rope")
        if not node.replace:
            fix = "drop model.rope, or set model.rope.replace=true"
            raise ModelError(what, fix=fix, key="model.rope.kind")
        if kind == "linear" and node.original_max_position_embeddings is None:
            key = "model.rope.original_max_position_embeddings"
            raise ModelError(f"{what}, which does not say the trained length", fix="say it here", key=key)
    held = own.get("original_max_position_embeddings") if kind != "default" else None
    return int(node.original_max_position_embeddings or held or config.max_position_embeddings)
