"""A model without the weights of its layers: these stay in their files until they are asked for (core/deferred.py).

transformers makes it as any other, of numbers that stand for the weights; where each of them has come to says which
weight of the files belongs there, whatever it is called. What it puts together of several weights, as the experts of a
mixture, is read at once and waits on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.deferred import Deferred, Entry, stand_in
from llmkit.models.layers import layers
from llmkit.models.safe import NUMBERED, Header


class Files:
    """The weights of checked files by name."""

    def __init__(self, folder: Path, headers: dict[str, Header]) -> None:
        self.folder = folder
        self.place = {name: file for file, header in headers.items() for name in header}
        self.shapes = {name: tuple(item["shape"]) for header in headers.values() for name, item in header.items()}

    def read(self, name: str) -> Tensor:
        """A weight in the pages of its file, which are read as they are touched, and are any process's that maps it."""
        from safetensors import safe_open

        with safe_open(self.folder / self.place[name], "pt") as held:
            made: Tensor = held.get_slice(name)[...]
        return made

    def of_a_layer(self, name: str) -> bool:
        """Whether it may be a weight of a layer as the model has it: a matrix, and none of a list inside of a layer."""
        return len(NUMBERED.findall(name)) == 1 and len(self.shapes[name]) > 1


class Piece:
    """What transformers reads a weight from."""

    def __init__(self, give: Callable[[], Tensor]) -> None:
        self.give = give

    def __getitem__(self, _: Any) -> Tensor:
        return self.give()


def unread(
    kind: Any, folder: Path, config: Any, dtype: torch.dtype, headers: dict[str, Header]
) -> tuple[Any, Any, Deferred] | None:
    """(model, what transformers tells of its loading, the weights that are not here), on the host; None for a model
    that changes single weights as it reads them."""
    files, given = Files(folder, headers), dict[int, tuple[str, Tensor]]()

    def stand(name: str) -> Tensor:
        made = stand_in(files.shapes[name], dtype)
        given[made.untyped_storage().data_ptr()] = name, made
        return made

    pieces = {
        name: Piece(partial(stand if files.of_a_layer(name) else files.read, name)) for name in sorted(files.place)
    }
    model, told = _made(kind, folder, config, dtype, pieces)
    there = layers(model)
    inside = {id(p) for layer in there for p in layer.parameters()}
    found = {id(p): p for p in model.parameters()}
    entries, met = [], set()
    for p in found.values():
        name, _ = given.get(p.untyped_storage().data_ptr(), ("", p))
        if name and tuple(p.shape) == files.shapes[name]:
            met.add(name)
            entries.append(Entry(p, partial(files.read, name)))
        elif id(p) in inside and p.dim() > 1:
            entries.append(Entry(p, partial(_same, p.data)))
    if met != {name for name, _ in given.values()}:
        return None
    for entry in entries:
        if id(entry.param) not in inside:
            entry.fill()
    inner = [entry for entry in entries if id(entry.param) in inside]
    return model, told, Deferred(inner, there, _say(inner, len(met)))


def _same(held: Tensor) -> Tensor:
    return held


def _say(entries: list[Entry], in_files: int) -> str:
    sizes = [entry.param.numel() * entry.param.element_size() for entry in entries]
    return f"layers are read as they are cut: {sum(sizes) >> 20} MiB of {len(sizes)} weights"


def _made(kind: Any, folder: Path, config: Any, dtype: torch.dtype, pieces: dict[str, Piece]) -> tuple[Any, Any]:
    from transformers import GenerationConfig

    with torch.device("meta"):
        shell: Any = type(kind.from_config(copy.deepcopy(config), dtype=dtype))
    config = config if isinstance(config, shell.config_class) else config.get_text_config()
    model, told = shell.from_pretrained(
        None,
        config=config,
        state_dict=pieces,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, told


def settled(model: nn.Module, held: Deferred, device: str) -> nn.Module:
    """A model whose weights are on a device, but for those that are not here."""
    shapes = [(entry.param, tuple(entry.param.shape)) for entry in held.entries.values()]
    for param, _ in shapes:
        param.data = torch.empty(0, dtype=param.dtype)
    model.to(device)
    for param, shape in shapes:
        param.data = stand_in(shape, param.dtype, device)
    return model
