"""A rank that only draws: a whole model of its own under an engine, fed before each rollout by the ranks that train."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from llmkit.build.held import Here
from llmkit.build.precision import types
from llmkit.core.artifact import Artifact
from llmkit.core.errors import ResourceError
from llmkit.core.memory import out_of_memory_named
from llmkit.core.peers import Apart
from llmkit.core.run import Run
from llmkit.core.shape import Shape
from llmkit.inference.engined import EngineWriter
from llmkit.models.load import DTYPES
from llmkit.models.outline import stored
from llmkit.plan.choice import HEADROOM
from llmkit.rl.elsewhere import Crossing, answer
from llmkit.rl.sync import Versioned
from llmkit.stages.apart_account import drawing_parts
from llmkit.stages.drawing import again
from llmkit.stages.from_rollouts import FromRollouts
from llmkit.stages.levelled import room_seen
from llmkit.stages.process import begin
from llmkit.stages.sizes import room, whole_model


def draw_apart(node: FromRollouts, run: Run, apart: Apart) -> Artifact:
    """Answers what the ranks that train ask, until they end.

    Raises:
        ResourceError: the model and its cache do not fit.
    """
    begin(run, node.deterministic)
    with out_of_memory_named(run.device, node.knob), run.stop.at_once("before training"):
        run.peers.phase("data")
        resolved, kinds = whole_model(node.model), types(node.types_name, run.device)
        most = _room(node, run, stored(resolved.folder))
        room_seen(run.peers)
        made = again(node, run, resolved, kinds)
        made.model.eval()
        crossing = Crossing(apart.whole, lambda name: (), (), made.trained)
    if apart.desk is None:
        raise TypeError("a rank that draws is asked")
    writer = node.rollout.engine.open(Here(made.loaded, made.model, most=most))
    if not isinstance(writer, EngineWriter):
        raise TypeError("the engine draws")

    def feed(version: int) -> None:
        run.peers.phase("data", version + 1)
        crossing(version)

    autocast = torch.autocast(run.device, DTYPES[kinds.short], enabled=kinds.mixed)
    with closing(Versioned(writer, feed)) as versioned, autocast, out_of_memory_named(run.device, node.knob):
        answer(apart.desk, versioned.renew, versioned, lambda: run.stop.why)
    return Artifact(Path(node.out))


def _room(node: FromRollouts, run: Run, shape: Shape) -> int:
    """Tokens that the cache need not hold more of.

    Raises:
        ResourceError: it does not fit beside the model.
    """
    draws = node.draws(1)
    if draws is None:
        raise TypeError("the stage draws no answers")
    need = sum(drawing_parts(node, shape, run.device).values())
    free = room(run.device, run.ranks)
    if need > HEADROOM * free:
        what = f"drawing needs about {need / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
        raise ResourceError(what, fix="lower rollout.engine.sequences, or set quant=bnb_nf4", key="rollout.ranks")
    return draws.room(1)
