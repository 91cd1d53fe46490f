"""Tokens a second on few, half and all ranks, each with as many rows: what of the ideal is left."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.cli.acceptance.equality import REFUSED, train_lines
from llmkit.cli.acceptance.made import LEFT_OUT, STEPS, node, words
from llmkit.cli.acceptance.trials import Kit
from llmkit.cli.acceptance.verdict import Check, at_least, holds, skipped


def scaling(kit: Kit) -> list[Check]:
    """Efficiency of half of the ranks and of all of them, beside the fewest that hold the recipe."""
    if kit.world == 1:
        return [skipped("all", "one rank has nothing to scale to")]
    rates, checks = dict[int, float](), list[Check]()
    for world in sorted({1, kit.world // 2, kit.world}):
        ended = kit.trial(words(kit, "speed", speed(kit, world), f"speed-{world}"), world)
        if ended.well:
            rates[world] = kit.main(partial(rate, kit.work / f"speed-{world}"))
            checks += _judged(kit, world, rates)
        else:
            refused = set(ended.codes) <= {*REFUSED} and not ended.hung
            checks.append(skipped(_name(world), ended.why) if refused else holds(_name(world), False, ended.why))
    kit.told["speed"] = kit.world in rates
    return checks


def speed(kit: Kit, world: int) -> list[str]:
    """Overrides of a run of so many ranks, each of which has as many rows as with all of them."""
    found = node(kit, "speed")
    said = [f"steps={STEPS[kit.device]}"]
    each = max(1, found.batch.examples // kit.world)
    if found.batch.tokens is not None:
        return [*said, f"batch.tokens={max(found.data.max_length, found.batch.tokens // kit.world * world)}"]
    return [*said, f"batch.rows={each * world}"]


def rate(folder: Path) -> float:
    """Tokens a second of all ranks, after the first steps."""
    lines: list[dict[str, Any]] = train_lines(folder)[LEFT_OUT:]
    return float(sum(line["tokens"] for line in lines) / sum(line["seconds"] for line in lines))


def _judged(kit: Kit, world: int, rates: dict[int, float]) -> list[Check]:
    fewest = min(rates)
    said = f"{rates[world]:,.0f} tokens/s"
    if world == fewest:
        return [Check(_name(world), "skipped", rates[world], None, f"{said}: what the others are measured by")]
    kept = rates[world] / rates[fewest] * fewest / world
    bar, cores = kit.bars.efficiency[kit.device], os.cpu_count() or 1
    here = kit.peers.share(kit.peers.ranks.here)
    if kit.device == "cpu" and min(world, here) > cores:
        return [Check(_name(world), "skipped", kept, None, f"{said}; {min(world, here)} ranks share {cores} cores")]
    return [at_least(_name(world), kept, bar.limit, f"{said}, beside {fewest} rank{'s' if fewest > 1 else ''}")]


def _name(world: int) -> str:
    return f"efficiency of {world} rank{'s' if world > 1 else ''}"
