"""The adapters of a loaded model: the one that it is itself, those that it is started with, those that come later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmkit.core.errors import ModelError
from llmkit.inference.adapters import MOST, Adapters, Bank
from llmkit.models.adapter_files import Base, lacks
from llmkit.models.bare import bare
from llmkit.models.decoder import Decoder
from llmkit.models.heads import causal_of
from llmkit.models.load import Loaded
from llmkit.models.loras import base_of
from llmkit.models.probe import Support, probe
from llmkit.models.virtual import virtual_tokens


@dataclass(frozen=True)
class Beside:
    """What is served over one base."""

    named: Mapping[str, str | Path] = field(default_factory=dict)
    """Name -> folder: there from the start."""
    root: Path | None = None
    """Under it adapters may be loaded by path while the engine runs; without it none are."""
    most: int = MOST
    """Adapters that lie ready at once."""


def alone(loaded: Loaded) -> str:
    """Why no adapter can be run beside the one that the model has; nothing if one can, or it has none."""
    return lacks(loaded.resolved.folder) if hasattr(loaded.model, "peft_config") else ""


def support(loaded: Loaded) -> Support:
    """What a model supports as the engine runs it: virtual tokens are tokens of their sequence there."""
    if virtual_tokens(loaded.model) and not alone(loaded):
        return probe(loaded.model.get_base_model())
    return loaded.support


def decoder(loaded: Loaded, exact: bool = False) -> Decoder:
    """A loaded model as the engine sees it: without its adapter, where that is run as those of requests are."""
    return Decoder(loaded.model if alone(loaded) else bare(loaded.model), base(loaded), exact=exact)


def base(loaded: Loaded) -> Base:
    """What adapters are checked against; asked for while the model is whole."""
    resolved = loaded.resolved
    rope = json.loads(json.dumps(asdict(resolved.rope))) if resolved.rope is not None else None
    return base_of(causal_of(loaded.model), (resolved.base or resolved).sha256, rope)


def adapters(loaded: Loaded, decoder: Decoder, beside: Beside = Beside()) -> Adapters:
    """What requests may ask for.

    Raises:
        ModelError: an adapter does not fit, or the model takes none beside its own.
    """
    resolved, why = loaded.resolved, alone(loaded)
    if why:
        if beside.named or beside.root is not None:
            what = f"{resolved.name} {why}, over which no other adapters are run"
            raise ModelError(what, fix="merge it into its base first", key="model")
        return Adapters()
    return adapters_in(decoder.bank, beside, resolved.folder if hasattr(loaded.model, "peft_config") else None)


def adapters_in(bank: Bank, beside: Beside, own: Path | None) -> Adapters:
    """What requests may ask for of a bank; `own` is the folder of the adapter that the model itself is.

    Raises:
        ModelError: an adapter does not fit.
    """
    made = Adapters(bank, beside.root, beside.most)
    if own is not None:
        made.be(own)
    for name, folder in beside.named.items():
        made.add(name, Path(folder).expanduser())
    return made
