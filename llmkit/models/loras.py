"""Many adapters over one base: each row of a step gets what its own adapter adds to a linear, and nothing else.

The base stays as it is: what is added comes in hooks behind its linears, so that whatever those are (fused, cut over
ranks, quantised) is left alone. Rows of one adapter are computed together, in products whose sums have one order, so
that a row is the same to the bit whatever is beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.core.errors import ModelError
from llmkit.core.types import Paged
from llmkit.models.adapter_files import Base, Factors, Lora, Prompt, read, renewed
from llmkit.models.ordered import product

Narrow = Callable[[str, Factors], Factors]
"""A linear's name and its factors -> the part of them that lies here."""


class Bank:
    """The adapters of a base, by key; what `inference/adapters.py` drives."""

    def __init__(self, model: nn.Module, base: Base, narrow: Narrow | None = None, exact: bool = True) -> None:
        """`model`: a causal language model of transformers, without adapters of peft. `narrow`: where it is cut.
        `exact`: whether a row is to be the same to the bit whatever is beside it."""
        self.model, self.base, self.narrow = model, base, narrow
        self.product = product if exact else torch.nn.functional.linear
        self.held: dict[str, Lora | Prompt] = {}
        self.hooks: dict[str, Any] = {}
        self.active: list[tuple[Lora, Tensor | None]] = []
        """What the forward that runs now adds, and to which of its rows; None is all of them."""
        self.rows = 0
        self.lock = threading.Lock()
        """Adapters come and go between forwards, whichever thread brings them."""

    def read(self, folder: Path) -> Lora | Prompt:
        """The adapter of a folder.

        Raises:
            ModelError: it cannot be run beside others, is not sound, or does not fit the base.
        """
        made = read(folder, self.base)
        if isinstance(made, Prompt):
            self._check_embeds()
        return made

    def made(self, like: str, tensors: Mapping[str, Tensor]) -> Lora | Prompt:
        """The adapter `like` with other weights, by the names that peft saves them under."""
        return renewed(self.held[like], tensors, self.base, "")

    def put(self, key: str, adapter: Lora | Prompt) -> None:
        """Keeps an adapter, on the devices of what it is on."""
        if isinstance(adapter, Lora):
            adapter = replace(adapter, factors={name: self._placed(name, f) for name, f in adapter.factors.items()})
        else:
            words = _embeddings(self.model).weight
            adapter = replace(adapter, table=adapter.table.to(words.device, words.dtype))
        with self.lock:
            self.held[key] = adapter
            for name in (adapter.factors.keys() if isinstance(adapter, Lora) else set()) - self.hooks.keys():
                self.hooks[name] = self.model.get_submodule(name).register_forward_hook(self._hook(name), prepend=True)

    def leave(self, adapter: Lora | Prompt) -> None:
        """It goes with whoever read it."""

    def drop(self, key: str) -> None:
        """Nobody needs it any longer."""
        with self.lock:
            del self.held[key]

    @contextmanager
    def over(self, attend: Paged, keys: Sequence[str]) -> Iterator[None]:
        """Inside, the model adds to each span's rows what the adapter of its key does."""
        with self.lock:
            self.active, self.rows = self._rows(attend, keys), sum(span.end - span.start for span in attend.spans)
            try:
                yield
            finally:
                self.active = []

    def given(self, tokens: Tensor, attend: Paged, keys: Sequence[str]) -> dict[str, Tensor]:
        """What the model is called with for tokens (N,), some of which may be virtual."""
        words, count = _embeddings(self.model), self.base.words
        if not any(isinstance(self._of(key), Prompt) for key in keys if key) or bool((tokens < count).all()):
            return {"input_ids": tokens[None]}
        embeds = words(torch.where(tokens < count, tokens, 0))
        for span, key in zip(attend.spans, keys, strict=True):
            one = self._of(key) if key else None
            if isinstance(one, Prompt):
                here = tokens[span.start : span.end] - count
                virtual = here >= 0
                embeds[span.start : span.end][virtual] = one.table[here[virtual]]
        return {"inputs_embeds": embeds[None]}

    def _of(self, key: str) -> Lora | Prompt:
        if key not in self.held:
            raise ModelError(f"no adapter is called {key}", fix="load it first", key="adapter")
        return self.held[key]

    def _rows(self, attend: Paged, keys: Sequence[str]) -> list[tuple[Lora, Tensor | None]]:
        spans: dict[str, list[Tensor]] = {}
        for span, key in zip(attend.spans, keys, strict=True):
            if key and isinstance(self._of(key), Lora):
                spans.setdefault(key, []).append(torch.arange(span.start, span.end))
        made: list[tuple[Lora, Tensor | None]] = []
        for key, parts in spans.items():
            one = self._of(key)
            if isinstance(one, Lora):
                whole = sum(map(len, parts)) == attend.spans[-1].end
                made.append((one, None if whole else torch.cat(parts).to(_device(self.model))))
        return made

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def add(_: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            for one, rows in self.active:
                if (factors := one.factors.get(name)) is not None:
                    out = self._added(name, args[0], out, factors, rows)
            return out

        return add

    def _added(self, name: str, x: Tensor, out: Tensor, factors: Factors, rows: Tensor | None) -> Tensor:
        flat, made = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        if len(flat) != self.rows:
            what = f"{name} is given {len(flat)} of {self.rows} rows, so that an adapter's own are not known"
            raise ModelError(what, fix="merge the adapter into its base", key="adapter")
        index = slice(None) if rows is None else rows.to(x.device)
        low = self.product(flat[index].to(factors.down.dtype), factors.down.to(x.device))
        more = self.product(low, factors.up.to(x.device)) * factors.scale
        made[index] = (made[index] + more).to(made.dtype)
        return made.view(out.shape)

    def _placed(self, name: str, factors: Factors) -> Factors:
        part = factors if self.narrow is None else self.narrow(name, factors)
        held = next(iter(self.model.get_submodule(name).parameters())).device
        device = "cpu" if held.type == "meta" else held  # a linear that waits elsewhere until it is called
        return Factors(part.down.to(device), part.up.to(device), part.scale)

    @torch.no_grad()
    def _check_embeds(self) -> None:
        """Raises: ModelError where the family makes something else of its tokens' embeddings than of the tokens."""
        tokens = torch.arange(1, 5, device=_embeddings(self.model).weight.device)[None]
        model: Any = self.model
        try:
            # without autocast, which of several ranks the one that loads is not in, and the others are
            with self.lock, torch.autocast(tokens.device.type, enabled=False):
                own = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
                ours = model.base_model(inputs_embeds=_embeddings(model)(tokens), use_cache=False).last_hidden_state
            same = torch.equal(own, ours)
        except (ValueError, TypeError, RuntimeError):
            same = False
        if not same:
            what = f"{type(model).__name__} takes no embeddings in the place of tokens, so none that are learned"
            raise ModelError(what, fix="use a LoRA", key="adapter")


def base_of(model: Any, sha256: str = "", rope: Any = None) -> Base:
    """What adapters are checked against."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    others = frozenset(name for name, module in model.named_modules() if module in ends)
    linears = {name: size for name, module in model.named_modules() if (size := _size(module)) and name not in others}
    words = len(model.get_output_embeddings().weight)
    return Base(linears, _embeddings(model).weight.shape[1], words, sha256, rope, others)


def _size(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear, be it a quantised one or a Conv1D of transformers."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)
    return None


def _device(model: Any) -> torch.device | str:
    """Of the embeddings; the host's, where they wait elsewhere until they are called."""
    held: torch.device = _embeddings(model).weight.device
    return "cpu" if held.type == "meta" else held


def _embeddings(model: Any) -> Any:
    return model.get_input_embeddings()
