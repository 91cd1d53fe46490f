"""Every strategy that the ranks allow comes to what one process comes to."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from llmkit.cli.acceptance.made import node, words
from llmkit.cli.acceptance.trials import Kit
from llmkit.cli.acceptance.verdict import Check, at_most, holds, skipped
from llmkit.cli.prove import apart, learned, precision, short
from llmkit.core.errors import RecipeError
from llmkit.core.metrics import Lines

REFUSED = (2, 4, 5)
"""Exit statuses of what does not go: recipe, model, memory."""

RATE = ["optim.lr=0.2"]
"""So that what three steps change of a weight is more than its rounding."""


def ways(world: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Names, and what is said under `parallel`."""
    yield "ddp", {"strategy": "ddp"}
    yield "fsdp", {"strategy": "fsdp"}
    if world >= 4 and world % 2 == 0:
        yield "fsdp, 2 copies", {"strategy": "fsdp", "replicate": 2}
    for stage in (1, 2, 3):
        yield f"zero {stage}", {"strategy": f"{{kind: zero, stage: {stage}}}"}
    for axis in ("tensor", "context"):
        for strategy in ("ddp", "fsdp") if world >= 4 else ("ddp",):
            yield f"{strategy} x {axis} 2", {"strategy": strategy, axis: 2}
    yield "context 2, ring", {"strategy": "ddp", "context": 2, "context_method": "ring"}


def said(way: dict[str, object]) -> list[str]:
    """A way as overrides that leave nothing of what a recipe says of it."""
    plain = {"replicate": "auto", "shard": "auto", "tensor": 1, "context": 1}
    return [f"parallel.{key}={value}" for key, value in (plain | way).items()]


def equality(kit: Kit) -> list[Check]:
    """Three steps in each way beside one process, or beside the first way that holds the recipe."""
    if kit.world == 1:
        return [skipped("all", "one rank has nobody to differ from")]
    one: tuple[str, dict[str, object]] = ("one process", {"strategy": "single"})
    first, checks = "", list[Check]()
    for index, (name, way) in enumerate([one, *ways(kit.world)]):
        world, more = (1 if index == 0 else kit.world), [*said(way), "steps=3", *([] if kit.recipe else RATE)]
        if why := _misfit(kit, name, world, more):
            checks.append(skipped(name, why))
            continue
        ended = kit.trial(words(kit, "tiny", more, f"equal-{index}"), world)
        if not ended.well:
            refused = set(ended.codes) <= {*REFUSED} and not ended.hung
            checks.append(skipped(name, ended.why) if refused else holds(name, False, ended.why))
        elif not first:
            first = f"equal-{index}"
            if index:
                checks.append(skipped(f"{name} beside one process", "one process does not hold it: the others are"))
        else:
            checks += _compared(kit, name, f"equal-{index}", first)
    return checks


def _misfit(kit: Kit, name: str, world: int, more: list[str]) -> str:
    """Why a way cannot run here, or nothing."""
    if name.startswith("zero") and find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    try:
        found = node(kit, "tiny", [*short(node(kit, "tiny"), None), *more])
        found.parallel.check(world, found.deterministic)
    except RecipeError as cause:
        return str(cause.problems[0])
    return ""


def _compared(kit: Kit, name: str, made: str, first: str) -> list[Check]:
    ours, theirs = kit.work / made, kit.work / first
    gap, weights = kit.main(lambda: apart(ours, theirs))
    found = node(kit, "tiny")
    plain = precision(found) == "fp32"
    checks = [at_most(name, gap, (kit.bars.equal if plain else kit.bars.equal_short).limit, "losses, gradient norms")]
    if kit.recipe is None:
        off = kit.main(lambda: learned(ours, theirs, kit.work / "tiny"))
        return [
            *checks,
            at_most(f"{name}: what was learned", off, kit.bars.learned.limit, "of the way that weights went"),
        ]
    if plain and found.optim.kind == "sgd":
        return [*checks, at_most(f"{name}: weights", weights, kit.bars.weights.limit)]
    return [*checks, Check(f"{name}: weights", "skipped", weights, None, "told, and judged under sgd in fp32 alone")]


def train_lines(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's steps."""
    return [line for line in Lines(folder / "metrics.jsonl").read() if line["event"] == "train"]
