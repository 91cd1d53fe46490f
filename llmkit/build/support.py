"""What each family supports, measured on a tiny model of it: `python -m llmkit.build.support` (then `make docs`)."""

from __future__ import annotations

import difflib
import json
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from llmkit.build.support_files import exported, over_nf4, stretched, write
from llmkit.build.support_lora import adapted
from llmkit.core.environment import prepare
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_atomic
from llmkit.models.attend import install
from llmkit.models.compare import BAR, Doubled, cached, exact, off, packed_case, tree_case, worst
from llmkit.models.families import FAMILIES, tiny
from llmkit.models.load import quiet
from llmkit.models.probe import probe
from llmkit.models.support import COLUMNS, DATA, YES, said


def measure(family: str) -> dict[str, str]:
    """One row of the table: column -> `yes`, `yes: exception`, or why not."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        row = contexts(family)
        packs = said(row["packed"])
        row["LoRA"], row["merge"] = adapted(family, packs)
        folder = write(family, Path(place, "base"))
        row |= {"QLoRA": over_nf4(folder, packs), "RoPE": stretched(folder), "export": exported(folder)}
    return {column: row[column] for column in COLUMNS}


def contexts(family: str) -> dict[str, str]:
    """The columns of contexts."""
    model = tiny(family).eval()
    install(model, "auto")
    support = probe(model)
    if not support.packed:
        return dict.fromkeys(("packed", "tree", "paged", "recompute"), support.reason)
    model = exact(model)
    name = type(model).__name__
    row = {"packed": _equal(name, "packed sequences", *worst(model, packed_case()))}
    row["tree"] = _equal(name, "a tree", *worst(model, tree_case())) if support.tree else support.reason
    with torch.no_grad(), Doubled():
        row["paged"] = _equal(name, "cached keys", off(*cached(model))) if support.paged else support.reason
    # the backward pass leaves `Doubled`, so recomputing enters it again
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), Doubled())})
    for module in model.modules():  # layers are recomputed in training mode alone; what is in them draws nothing
        module.training = isinstance(module, GradientCheckpointingLayer)
    return row | {"recompute": _equal(name, "recompute", *worst(model, packed_case()))}


def _equal(name: str, what: str, *found: float) -> str:
    return YES if max(found) <= BAR else f"{name} gives other values under {what} (off by {max(found):.0e})"


def main(names: list[str]) -> None:
    """Measures all families, or these, and writes the table."""
    prepare()
    for name in names:
        if name not in FAMILIES:
            near = difflib.get_close_matches(name, FAMILIES, 1)
            fix = f"did you mean {near[0]}?" if near else f"give one of {', '.join(FAMILIES)}"
            raise RecipeError(f"{name} is no family of the table", fix=fix)
    kept: dict[str, Any] = json.loads(DATA.read_text("utf-8"))["families"] if names else {}
    rows = {}
    for family in FAMILIES:
        if not names or family in names:
            kept[family] = measure(family)
            sys.stderr.write(f"{family}: {kept[family]}\n")
        if family in kept:
            rows[family] = kept[family]
    table = {"transformers": transformers.__version__, "families": rows}
    write_atomic(DATA, (json.dumps(table, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
