"""Bottleneck blocks in the layers of a model: putting them in, saving and reading them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkit.adapters.bottleneck import Bottleneck
from llmkit.adapters.method import Around
from llmkit.core.errors import ModelError, RecipeError

PEFT_TYPE = "LLMKIT_BOTTLENECK"
PARTS = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn", "block_sparse_moe", "moe"),
}
"""What the parts of a layer are called."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
STD = 1e-2
"""Of the first half's weights at the start, as in arXiv:1902.00751."""


class Block(nn.Module):
    """x + up(act(down(x))), the identity at first; in fp32 whatever the model is."""

    def __init__(self, width: int, size: int, activation: str, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        self.activation = activation
        nn.init.normal_(self.down.weight, std=STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)."""
        wide = x.to(self.up.weight.dtype)
        made: Tensor = wide + self.up(ACTIVATIONS[self.activation](self.down(wide)))
        return made.to(x.dtype)


class Followed(nn.Module):
    """A part of a layer, then a block over its (first) output; what is asked of the part is answered by it."""

    def __init__(self, inner: nn.Module, bottleneck: Block) -> None:
        super().__init__()
        self.inner, self.bottleneck, self.enabled = inner, bottleneck, True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the part's own."""
        out = self.inner(*args, **kwargs)
        if not self.enabled:
            return out
        return (self.bottleneck(out[0]), *out[1:]) if isinstance(out, tuple) else self.bottleneck(out)


@dataclass
class Settings:
    """What `adapter_config.json` says."""

    size: int
    after: tuple[str, ...]
    activation: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: str = PEFT_TYPE
    task_type: str = "CAUSAL_LM"
    is_prompt_learning: bool = False


class Bottlenecked(nn.Module):
    """A model with blocks in its layers, under the names by which peft's models are asked."""

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config = {"default": settings}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def active_peft_config(self) -> Settings:
        """As of peft's models."""
        return self.peft_config["default"]

    def get_base_model(self) -> Any:
        """The model inside, its blocks in their places."""
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model without its blocks, meanwhile."""
        places = [module for module in self.modules() if isinstance(module, Followed)]
        for place in places:
            place.enabled = False
        try:
            yield
        finally:
            for place in places:
                place.enabled = True

    def tensors(self) -> dict[str, Tensor]:
        """The blocks' parameters by the names that they are saved under."""
        return {
            f"base_model.model.{name}.bottleneck.{key}": value
            for name, module in self.base_model.named_modules()
            if isinstance(module, Followed)
            for key, value in module.bottleneck.named_parameters()
        }

    def save_pretrained(self, folder: Path) -> None:
        """Writes the two files that peft's adapters have."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        said = {key: value for key, value in asdict(self.active_peft_config).items() if key != "is_prompt_learning"}
        Path(folder, "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        held = {name: value.detach().cpu().contiguous() for name, value in self.tensors().items()}
        save_file(held, Path(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def attach(model: Any, node: Bottleneck, around: Around = Around()) -> Bottlenecked:
    """`model` frozen, with a block after each part that `node` names of each layer of its text.

    Raises:
        ModelError: a layer has no such part, or one that adds its residual itself.
    """
    width = int(model.config.get_text_config().hidden_size)
    places = [
        _place(layer, part, name) for name, layer in _layers(model, around.idle) for part in dict.fromkeys(node.after)
    ]
    around.notice(f"{len(places)} blocks are put in")
    model.requires_grad_(False)
    for layer, child in places:
        inner = getattr(layer, child)
        device = next(inner.parameters()).device
        setattr(layer, child, Followed(inner, Block(width, node.size, node.activation, device)))
    return Bottlenecked(model, Settings(node.size, node.after, node.activation))


def _layers(model: Any, idle: Sequence[str]) -> list[tuple[str, nn.Module]]:
    count = int(model.config.get_text_config().num_hidden_layers)
    for name, module in model.named_modules():
        beside = any(name == one or name.startswith(f"{one}.") for one in idle)
        if isinstance(module, nn.ModuleList) and len(module) == count and not beside:
            return [(f"{name}.{index}", layer) for index, layer in enumerate(module)]
    raise _refused(f"{type(model).__name__} has no list of its {count} layers")


def _place(layer: nn.Module, part: str, name: str) -> tuple[nn.Module, str]:
    """The layer and the name of that part of it."""
    children = dict(layer.named_children())
    child = next((known for known in PARTS[part] if known in children), None)
    if child is None:
        raise _refused(f"{name} has no {part} by a name that we know, but {', '.join(children)}")
    if "residual" in inspect.signature(children[child].forward).parameters:
        raise _refused(f"{name}.{child} adds its residual itself, so nothing can stand before that")
    return layer, child


def _refused(what: str) -> ModelError:
    return ModelError(what, fix="use lora, or leave that part out of adapter.after", key="adapter.kind")


def read(model: Any, folder: Path, idle: Sequence[str] = ()) -> Bottlenecked:
    """The blocks of a folder in the layers of `model`.

    Raises:
        ModelError: the folder and the model do not fit together.
    """
    said = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    try:
        node = Bottleneck(size=said["size"], after=said["after"], activation=said["activation"])
    except (KeyError, RecipeError) as cause:
        what = f"lacks {cause.args[0]}" if isinstance(cause, KeyError) else cause.problems[0].what
        raise ModelError(what, fix="fetch the adapter again", file=str(folder / "adapter_config.json")) from cause
    made = attach(model, node, Around(tuple(idle)))
    places, held = made.tensors(), load_file(folder / "adapter_model.safetensors")
    odd = sorted(places.keys() ^ held.keys()) or [n for n in sorted(places) if places[n].shape != held[n].shape]
    if odd:
        side = (
            "lacks" if odd[0] not in held else "has no place for" if odd[0] not in places else "has another shape for"
        )
        raise ModelError(f"{side} {odd[0]}", fix="give the base that it was made for", file=str(folder))
    with torch.no_grad():
        for name, value in held.items():
            places[name].copy_(value)
    settings = made.active_peft_config
    settings.base_model_name_or_path, settings.revision = said.get("base_model_name_or_path"), said.get("revision")
    return made.requires_grad_(False)
