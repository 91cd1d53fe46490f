"""A model as a generator wants it: in this process, over devices, or over several processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from llmkit.build.adapters_of import Beside
from llmkit.build.engines import engine_over
from llmkit.build.held import Here, autocast
from llmkit.build.leading import Leading
from llmkit.build.opening import load
from llmkit.build.placed import check_placement
from llmkit.build.precision import Types
from llmkit.build.ranked import Spread
from llmkit.core.errors import ModelError
from llmkit.inference.adapters import check_folders
from llmkit.inference.engine import Engine
from llmkit.inference.node import OwnEngine
from llmkit.inference.writer import Files
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef, Quant
from llmkit.models.resolve import Resolved


@dataclass(frozen=True)
class Together:
    """A model that several processes hold together, of which this is the first; only the engine runs it."""

    leading: Leading
    device: str
    beside: Beside = Beside()
    mixed: bool = False

    @property
    def loaded(self) -> Loaded:
        """With the part of its weights that lies here."""
        return self.leading.loaded

    @property
    def apart(self) -> str:
        """Where it lies."""
        return f"{self.leading.others.world} processes hold it together"

    @property
    def model(self) -> Any:
        """What of it lies here."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.loaded.tokenizer

    def computing(self) -> AbstractContextManager[Any]:
        """Autocast, or nothing; the other processes have their own."""
        return autocast(self.device, self.mixed)

    def engine(self, how: OwnEngine) -> Engine:
        """An engine over it.

        Raises:
            ModelError: an adapter does not fit.
        """
        return engine_over(self.loaded, self.leading.led, how, self.beside)

    def files(self) -> Files:
        """Raises: ModelError: it is held here in parts."""
        raise ModelError(self.apart, fix="give one generator alone", key="generator")

    def check(self) -> None:
        """Raises: LlmkitError: another process is to blame for what cannot go on."""
        self.leading.check()

    def close(self) -> None:
        """All processes but this one end."""
        self.leading.close()


Held = Here | Together


def held(
    resolved: Resolved,
    ref: ModelRef,
    types: Types,
    device: str,
    how: Any,
    beside: Beside = Beside(),
    quant: Quant | None = None,
    allow_code: bool = False,
) -> Held:
    """A model as a generator `how` wants it: here, over devices, or over processes.

    Raises:
        RecipeError: it cannot be spread so.
        ModelError: it cannot be loaded, or an adapter has no folder.
        PeerError: another process could not be started.
    """
    check_folders(beside.named)
    quant = quant or resolved.quant
    tensor, placement = (how.tensor, how.placement) if isinstance(how, OwnEngine) else (1, None)
    if tensor > 1:
        kinds = {"device": device, "dtype": types.params, "half": types.half, "allow_code": allow_code}
        spread = Spread(ref, quant, kinds, how.cache, mixed=types.mixed)
        return Together(Leading(resolved, spread, tensor), device, beside, types.mixed)
    if placement is not None:
        check_placement(placement, quant)
    at = device if placement is None else "cpu"  # whole on the host before it is placed
    loaded = load(resolved, ref, How(at, types.params, types.half, quant, allow_code))
    apart = "" if placement is None else "its layers are placed over devices"
    return Here(loaded, beside=beside, mixed=types.mixed, apart=apart, device=device)
