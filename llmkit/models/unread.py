"""A model without the weights of its layers: these stay in their files until they are asked for (core/deferred.py).

transformers makes it as any other, of numbers that stand for the weights; where each of them has come to says which
weight of the files belongs there, whatever it is called. What it puts together of several weights, as the experts of a
mixture, is read at once and waits on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.deferred import Deferred, Entry, stand_in
from llmkit.models.layers import layers
from llmkit.models.safe import NUMBERED, Header

BLOCK = (1, 64)
"""Numbers that make a block of a 4-bit weight."""


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
    kind: Any, folder: Path, config: Any, dtype: torch.dtype, headers: dict[str, Header], options: Mapping[str, Any]
) -> tuple[Any, Any, Deferred] | None:
    """(model, what transformers tells of its loading, the weights that are not here), on the host, or where `options`
    put what they quantise; None for a model that changes single weights as it reads them."""
    files = Files(folder, headers)
    short = NoWeights(files, dtype, bool(options))
    pieces = {
        name: Piece(partial(short.give if files.of_a_layer(name) else files.read, name)) for name in sorted(files.place)
    }
    model, told = _made(kind, folder, config, dtype, pieces, options)
    there = layers(model)
    inside = {id(p) for layer in there for p in layer.parameters()}
    entries = short.quantised(model) if options else short.found(model, inside)
    if entries is None:
        return None
    for entry in entries:
        if id(entry.param) not in inside:
            entry.fill()
    inner = [entry for entry in entries if id(entry.param) in inside]
    return model, told, Deferred(inner, there, f"layers are read as they are cut: {len(inner)} weights")


class NoWeights:
    """What stands for weights, and where each has come to."""

    def __init__(self, files: Files, dtype: torch.dtype, quantised: bool) -> None:
        self.files, self.dtype, self.small = files, dtype, quantised
        self.given = dict[str, Tensor]()

    def give(self, name: str) -> Tensor:
        """Stands for a weight: in its shape, or as little as can be quantised."""
        made = torch.zeros(BLOCK, dtype=self.dtype) if self.small else stand_in(self.files.shapes[name], self.dtype)
        self.given[name] = made
        return made

    def found(self, model: nn.Module, inside: set[int]) -> list[Entry] | None:
        """Every parameter that a stand-in has become, and those of layers (`inside`) that are put together of several
        weights; None if a stand-in has become something else."""
        names = {made.untyped_storage().data_ptr(): name for name, made in self.given.items()}
        entries, met = [], set()
        for p in model.parameters():
            name = names.get(p.untyped_storage().data_ptr(), "")
            if name and tuple(p.shape) == self.files.shapes[name]:
                met.add(name)
                entries.append(Entry(p, partial(self.files.read, name)))
            elif id(p) in inside and p.dim() > 1:
                entries.append(Entry(p, partial(_same, p.data)))
        return entries if met == self.given.keys() else None

    def quantised(self, model: nn.Module) -> list[Entry] | None:
        """The weights of 4-bit linears, which are quantised as they are read; None if anything else was stood for."""
        from transformers.pytorch_utils import Conv1D

        modules, entries = dict(model.named_modules()), []
        for name in self.given:
            path, _, key = name.rpartition(".")
            linear: Any = modules.get(path)
            if type(linear).__name__ != "Linear4bit" or key != "weight" or linear.source_cls is Conv1D:
                return None
            if (linear.out_features, linear.in_features) != self.files.shapes[name]:
                return None
            empty = partial(_put, linear, linear.weight.data, linear.weight.quant_state)
            entries.append(
                Entry(linear.weight, partial(self.files.read, name), partial(_quantise, linear, self.dtype), empty)
            )
        return entries


def _quantise(linear: Any, dtype: torch.dtype, value: Tensor) -> None:
    """Gives a 4-bit linear its weight, as transformers does, and leaves the parameter the same one."""
    held = linear.weight
    keys = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    settings = {key: getattr(held, key) for key in keys}
    made = type(held)(value.to(held.device, dtype), requires_grad=False, **settings).to(held.device)
    _put(linear, made.data, made.quant_state)


def _put(linear: Any, data: Tensor, state: Any) -> None:
    linear.weight.data, linear.weight.quant_state, linear.quant_state = data, state, state


def _same(held: Tensor) -> Tensor:
    return held


def _made(
    kind: Any, folder: Path, config: Any, dtype: torch.dtype, pieces: dict[str, Piece], options: Mapping[str, Any]
) -> tuple[Any, Any]:
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
        **options,
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
