"""What the probe said of a model, kept by all that it follows from: a model is tried once, not at every start.

An entry's name is the sha256 of the weights' own digest, the configuration as loaded, how parameters are held and
where, the family's source, and the text and versions of what computes: another byte in any of these is another name.
Entries lie in the cache, which nobody else may write to, under hashes of their own (`core/shelf.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llmkit_kernels
import torch
from llmkit_kernels.build import Missing, library

from llmkit.core.errors import ResourceError
from llmkit.core.shelf import entry, key_of
from llmkit.models.probe import Support, probe
from llmkit.models.resolve import Resolved

LOG = logging.getLogger("llmkit")
SHELF = "probes"
COMPILED = ("attention", "gated", "linear", "norm", "paged")


def tried(model: Any, base: Resolved, added: Sequence[int] = ()) -> Support:
    """What a model of the weights of `base` supports, with rows for tokens that were `added` to it: from the cache, or
    by trying it. One that brings code of its own is tried each time: that code may read anything."""
    family = type(model)
    if not base.sha256 or not family.__module__.startswith("transformers."):
        return probe(model)

    def make(_: Path, __: Callable[[], None]) -> Mapping[str, Any]:
        return asdict(probe(model))

    try:
        with entry(SHELF, key_of(_facts(model, base, added)), make) as held:
            return Support(**held.facts)
    except ResourceError as cause:
        LOG.info("what the model supports is tried and not kept: %s", cause)
        return probe(model)


def _facts(model: Any, base: Resolved, added: Sequence[int]) -> dict[str, Any]:
    """All that the answer follows from."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    held = [[name, type(p).__name__, f"{p.dtype} {p.device}", *p.shape] for name, p in model.named_parameters()]
    return {
        "weights": base.sha256,
        "added": list(added),
        "config": config,
        "attention": model.config.get_text_config()._attn_implementation,
        "family": [type(model).__qualname__, _digest([Path(inspect.getfile(type(model)))])],
        "held": hashlib.sha256(json.dumps(held).encode()).hexdigest(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "code": _code(),
    }


@cache
def _code() -> dict[str, str]:
    """What computes: the text of this package, what is compiled of it, and the versions of the libraries under it."""
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "core", Path(llmkit_kernels.__file__).parent]
    own = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"llmkit": _digest(own)} | versions | {name: _compiled(name) for name in COMPILED}


def _compiled(operation: str) -> str:
    """The name of a compiled row, which says what it was made from and for; or why there is none."""
    try:
        return Path(library(operation)._name).name
    except Missing as why:
        return str(why)


def _digest(paths: Sequence[Path]) -> str:
    made = hashlib.sha256()
    for path in paths:
        made.update(path.name.encode() + path.read_bytes())
    return made.hexdigest()
