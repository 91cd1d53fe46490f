"""A model over several ranks, for the engine: each loads its part, by the plans that training has, and follows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from llmkit.build.adapters_of import base
from llmkit.build.cache import store_of
from llmkit.build.engines import check_engine
from llmkit.core.convert import convert, wrapped
from llmkit.core.errors import ModelError, RecipeError
from llmkit.core.wording import Report
from llmkit.inference.cache import Cache
from llmkit.inference.ranks import Part, Rank
from llmkit.models import load as files
from llmkit.models import safe
from llmkit.models.adapter_files import PROMPTS, Factors, lacks
from llmkit.models.decoder import Decoder
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef, NoQuant, Quant
from llmkit.models.paged import BlockStore
from llmkit.models.resolve import Resolved
from llmkit.parallel.fits import check_tensor
from llmkit.parallel.group import Group
from llmkit.parallel.tensor import Layout, Place, cut
from llmkit.parallel.tensor_team import left
from llmkit.parallel.wire import Wire


@dataclass(frozen=True)
class Spread:
    """How a model and its cache are held over ranks: what the first tells the others before they begin."""

    model: ModelRef
    quant: Quant
    how: Mapping[str, Any]
    """Device, types and what is allowed: fields of `How`."""
    cache: Cache = Cache()
    """Of each rank."""
    most: int | None = None
    """Tokens that it need not hold more of."""
    mixed: bool = False
    """Whether products run in 16 bits under autocast."""

    def said(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)

    @staticmethod
    def heard(said: Mapping[str, Any]) -> Spread:
        """From a JSON object."""
        report = Report()
        model = convert(ModelRef, wrapped(said["model"]), "model", report)
        quant = convert(Quant, wrapped(said["quant"]), "quant", report)
        cache = convert(Cache, wrapped(said["cache"]), "cache", report)
        report.stop_if_bad()
        return Spread(**{**said, "model": model, "quant": quant, "cache": cache})


def check(resolved: Resolved, quant: Quant, tensor: int, device: str = "cpu") -> None:
    """Sees to it that a model can be held by `tensor` ranks, before any of it is read.

    Raises:
        RecipeError: its heads cannot be dealt out evenly, or there are fewer GPUs.
        ModelError: it is quantised, or has an adapter that cannot be run on ranks.
    """
    if device == "cuda" and torch.cuda.device_count() < tensor:
        what = f"{tensor} processes take a GPU each, and {torch.cuda.device_count()} are here"
        raise RecipeError(what, fix="give fewer", key="tensor")
    if not isinstance(quant, NoQuant):
        raise ModelError("a quantised base is not cut over ranks", fix="set tensor=1, or drop quant", key="tensor")
    if resolved.base is not None and (why := lacks(resolved.folder)):
        what = f"{resolved.name} {why}, and cannot be run on several ranks"
        raise ModelError(what, fix="merge it into its base, or set tensor=1", key="tensor")
    check_tensor(safe.read_json((resolved.base or resolved).folder / "config.json"), tensor, "tensor")


def opened(resolved: Resolved, spread: Spread) -> Loaded:
    """The base of a model, whose layers are not read before they are cut; an adapter stays in its folder.

    Raises:
        ModelError: it cannot be loaded, or run by the engine.
    """
    how = How(**{**spread.how, "quant": spread.quant, "deferred": True})
    loaded = files.load(resolved, spread.model, how, dict.fromkeys(("LORA", *PROMPTS), _aside))
    check_engine(loaded)
    return loaded


def _aside(model: Any, folder: Path, towers: Any) -> Any:
    return model


def rank_of(loaded: Loaded, spread: Spread, group: Group) -> Rank:
    """What this rank holds of a model that is whole until then, and does for the others.

    Raises:
        ModelError: transformers has no plan for the model, or the parts do not give what the whole gives.
        ResourceError: there is no room for a cache.
    """
    model, facts = loaded.model, base(loaded)
    group.barrier("start")  # some have read for longer than others
    place = Place(group.ranks.rank, group.ranks.world, dist.group.WORLD)
    with torch.no_grad(), group.naming():
        layout = left(model, place, loaded.deferred, cut, dict(model._tp_plan or {}), "tensor", "it has no plan")
        loaded.deferred.fill(model)
    shares = _cut_head(model, place)
    decoder = Decoder(model, facts, _narrow(model, layout))
    wire = Wire(group)

    def least(fit: int) -> int:
        return min(int(one) for one in wire.gather(torch.tensor([fit], device=decoder.device)))

    with group.naming():
        store = store_of(decoder, spread.cache, most=spread.most, ranks=group.ranks.world, least=least)
    group.phase("answering")
    return Rank(Part(decoder, facts.hidden, shares), store, decoder.bank, wire, BlockStore)


def _cut_head(model: Any, place: Place) -> bool:
    """Leaves some rows of the output head; of a tied one they are a view of the embeddings. Whether it could."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or len(head.weight) < place.count:
        return False
    rows, tied = len(head.weight), head.weight is model.get_input_embeddings().weight
    mine = slice(rows * place.index // place.count, rows * (place.index + 1) // place.count)
    made = copy.copy(head)
    made._parameters = {
        name: None if held is None else nn.Parameter(held.data[mine] if tied else held.data[mine].clone(), False)
        for name, held in head._parameters.items()
    }
    made.out_features = mine.stop - mine.start
    model.set_output_embeddings(made)
    return True


def _narrow(model: nn.Module, layout: Layout) -> Any:
    """A linear's factors -> what belongs to the part of it that lies here."""
    cuts = {id(tensor): one for tensor, one in layout.cuts}

    def narrow(name: str, factors: Factors) -> Factors:
        one = cuts.get(id(getattr(cast(Any, model.get_submodule(name)), "weight", None)))
        if one is None:
            return factors
        if one.dim == 0:
            return replace(factors, up=one.of(factors.up))
        return replace(factors, down=one.of(factors.down))

    return narrow
