"""What a training stage needs, and what its `auto`s come to."""

from __future__ import annotations

from llmkit.adapters.node import Lora
from llmkit.build.precision import Types, types
from llmkit.core.errors import ModelError, ResourceError
from llmkit.core.memory import available
from llmkit.models.node import Int8, ModelRef, Nf4, NoQuant
from llmkit.models.resolve import Resolved, resolve
from llmkit.models.safe import check_folder, read_json
from llmkit.plan.account import Choice, Held, Shape, choose
from llmkit.stages.sft import Sft
from llmkit.train.node import AdamW8bit

KNOB = "lower micro_batch or data.max_length, or set memory.recompute=full"


def whole_model(ref: ModelRef) -> Resolved:
    """The files of a model that can be trained.

    Raises:
        ModelError: there are none, or they are an adapter's.
    """
    resolved = resolve(ref)
    if resolved.base is not None:
        what = f"{ref.name} is an adapter; training goes on from a whole model"
        raise ModelError(what, fix="merge it first", key="model")
    return resolved


def sizes(node: Sft, resolved: Resolved, device: str) -> tuple[Shape, Choice]:
    """The memory account of a stage, and what `auto` comes to.

    Raises:
        ResourceError: it cannot fit.
    """
    headers = check_folder(resolved.folder)
    tensors = {name: item["shape"] for header in headers.values() for name, item in header.items()}
    shape = Shape.read(read_json(resolved.folder / "config.json"), tensors)
    kinds = types(node.precision, device)
    rows = node.micro_batch if isinstance(node.micro_batch, int) else None
    wanted = {"auto": None, "none": False, "full": True}[node.memory.recompute]
    free = available(device)
    choice = choose(shape, _held(node, shape, kinds, device), node.data.max_length, free, device, rows, wanted)
    if not choice.fits:
        need, there = choice.account.total / 2**20, free / 2**20
        raise ResourceError(
            f"training needs about {need:.0f} MiB, {there:.0f} MiB are free", fix=KNOB, key="micro_batch"
        )
    return shape, choice


def _held(node: Sft, shape: Shape, kinds: Types, device: str) -> Held:
    plain = 2.0 if kinds.params == "bf16" else 4.0
    weight = {Nf4: 0.6, Int8: 1.1, NoQuant: plain}[type(node.quant)]
    trained = node.adapter.rank * shape.linears if isinstance(node.adapter, Lora) else shape.params
    moments = 2.1 if isinstance(node.optim, AdamW8bit) else 8.0
    return Held(weight, 2 if kinds.half else 4, trained, moments, False, 48 << 20 if device == "cpu" else 256 << 20)
