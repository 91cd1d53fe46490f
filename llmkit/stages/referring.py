"""References at work: beside the policy in its forward, or asked before training and kept with the run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmkit.build.opening import load
from llmkit.build.precision import types
from llmkit.build.training import Built, headed, how
from llmkit.core.errors import ModelError, told_below
from llmkit.core.files import write_atomic
from llmkit.core.run import Run
from llmkit.core.types import Batch
from llmkit.data.batches import micro_batches
from llmkit.data.groups import Groups
from llmkit.data.node import FirstFit, NoPacking
from llmkit.models.heads import Scored
from llmkit.models.load import DTYPES, Loaded
from llmkit.models.node import ModelRef
from llmkit.models.referred import Referred
from llmkit.models.resolve import resolve
from llmkit.stages.preference import Preference
from llmkit.stages.training import Training

TOKENS = 4096
"""Of a forward of the reference, about."""


def beside(built: Built, reference: Scored | None) -> Built:
    """The policy with its reference in one module."""
    if not isinstance(built.scored, Scored):
        raise TypeError("a policy is a language model")
    return replace(built, scored=Referred(built.scored, reference))


def loaded(stage: Training, ref: ModelRef, run: Run) -> Scored:
    """A reference that is held beside the policy: frozen, in the precision that products are made in."""
    return _opened(stage, ref, run)[1]


def _opened(stage: Training, ref: ModelRef, run: Run) -> tuple[Loaded, Scored]:
    """A model as the stage holds its own.

    Raises:
        ModelError: it cannot be loaded, has other tokens, or is no language model.
    """
    kinds = types(stage.types_name, run.device)
    held = how(run.device, kinds, stage.quant, stage.adapter, run.grants.code, run.grants.nonfinite)
    with told_below("model" if ref == stage.model else "reference.path", "model"):
        made = load(resolve(ref), ref, held)
    scored = headed(made, made.model)
    if not isinstance(scored, Scored):
        raise ModelError(f"{ref.name} is no language model", fix="give the policy's own start", key="reference.path")
    made.model.requires_grad_(False)
    scored.eval()
    return made, scored


def computed(stage: Preference, ref: ModelRef, groups: Groups, run: Run, key: str) -> Groups:
    """The examples with the reference's log-probability of each token as `each["reference"]`; what an earlier start of
    the run made is read from its folder."""
    said = [resolve(ref).sha256, repr(ref), groups.digest, stage.types_name, repr(stage.quant), stage.data.max_length]
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    path = run.folder / f"reference.{key}.{name}.npy"
    if path.is_file():
        logps = np.load(path, allow_pickle=False)
    else:
        logps = _asked(stage, ref, groups, run, key)
        buffer = io.BytesIO()
        np.save(buffer, logps, allow_pickle=False)
        write_atomic(path, buffer.getvalue())
    return replace(groups, each={**groups.each, "reference": logps})


def _asked(stage: Preference, ref: ModelRef, groups: Groups, run: Run, key: str) -> np.ndarray[Any, Any]:
    """(tokens,) in fp32; 0 for tokens that no position foretells with a weight."""
    made, scored = _opened(stage, ref, run)
    kinds = types(stage.types_name, run.device)
    places = replace(groups, each={"place": np.arange(len(groups.ids))})
    logps = np.zeros(len(groups.ids), np.float32)
    run.console.start(f"reference of {key}", len(groups), 0)
    done = 0
    for batch in _batches(stage, places, made, run):
        with torch.no_grad(), torch.autocast(run.device, DTYPES[kinds.short], enabled=kinds.mixed):
            found = scored(batch)
        if batch.branches is not None:
            logps[batch.branches.each["place"].cpu().numpy()] = found.float().cpu().numpy()
        done += len(batch.ids)
        run.console.step(f"reference of {key}", done, len(groups), "")
        run.stop.check("while the reference is asked")
    run.console.end()
    return logps


def _batches(stage: Preference, groups: Groups, made: Loaded, run: Run) -> Iterator[Batch]:
    """All examples in order, a few hundred planned at a time."""
    support, size = made.support, stage.row_tokens
    packing = FirstFit() if support.packed else NoPacking()
    tree = stage.shares(made)
    for first in range(0, len(groups), 256):
        ids = range(first, min(first + 256, len(groups)))
        rows = max(1, TOKENS // size)
        yield from micro_batches(groups, ids, packing, size, rows, support.packed, run.device, trees=tree)
