"""`llmkit prove recipe`: the same steps, cut up in other ways, must come to the same."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.cli.recipes import out
from llmkit.core.console import Console
from llmkit.core.errors import DataError, ModelError, PeerError, RecipeError, ResourceError
from llmkit.core.ranks import Ranks, free_port
from llmkit.stages.training import Training

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"fp32": 1e-5}
"""Relative, of losses and gradient norms; in 16 bits a sum's order is worth `LOOSE`."""
LOOSE = 2e-2


@dataclass(frozen=True)
class Way:
    """One way to cut up a step."""

    ranks: int
    micro_batch: int


@dataclass(frozen=True)
class Seen:
    """What a way came to, and how far it is from the first one."""

    ranks: int
    micro_batch: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    gap: float
    """The largest relative difference of a loss or a gradient norm."""
    weights: float
    """The largest difference of a trained weight, relative to the largest of its tensor."""


def recipe(path: str, overrides: Sequence[str], ranks: int, steps: int, as_json: bool) -> int:
    """Runs `steps` steps in each way and compares; 0 if all agree.

    Raises:
        RecipeError: the recipe is not one stage that trains.
        PeerError: a way does not run at all.
    """
    from llmkit.recipe.load import load_recipe

    loaded = load_recipe(path, overrides)
    node = loaded.stages[0][1]
    if len(loaded.stages) > 1 or not isinstance(node, Training):
        raise RecipeError("one stage that trains is what can be proved", fix="give its recipe", file=path)
    tolerance = TOLERANCE.get(precision(node), LOOSE)
    console, found = Console(), list[Seen]()
    with tempfile.TemporaryDirectory(prefix="llmkit-prove-") as folder:
        first: Path | None = None
        chosen = ways(node, ranks)
        if len(chosen) < 2:
            what = f"up to {ranks} ranks there are {len(chosen)} ways to cut up a step, and two are compared"
            raise RecipeError(
                what, fix="give more --ranks, or degrees of parallel that divide them", file=path, key="parallel"
            )
        for way in console.track(chosen, "proving", len(chosen)):
            made = _run(path, [*overrides, *short(node, steps)], way, Path(folder))
            found.append(_seen(way, made, first or made))
            first = first or made
    agreed = all(seen.gap <= tolerance for seen in found)
    if as_json:
        out(json.dumps({"tolerance": tolerance, "agreed": agreed, "ways": [asdict(seen) for seen in found]}))
    else:
        out("\n".join(_table(found, tolerance)))
    return 0 if agreed else PeerError.code


def ways(node: Training, ranks: int) -> list[Way]:
    """The ways that are compared, of those that go with `parallel`: the largest micro-batch on one process first, then
    smaller ones and more ranks."""
    most = max(1, min(4, node.batch.examples if node.batch.tokens is None else 4))
    sizes = sorted({most, max(1, most // 2), 1}, reverse=True)
    worlds = [n for n in (2, 4, 8) if n <= ranks]
    made = [Way(1, size) for size in sizes] + [Way(n, size) for n in worlds for size in {sizes[0], 1}]
    if not _fits(node, 1):
        made = [Way(n, size) for n in worlds for size in sizes]
    return [way for way in made if _fits(node, way.ranks)]


def _fits(node: Training, world: int) -> bool:
    try:
        node.parallel.check(world, node.deterministic)
    except RecipeError:
        return False
    return True


def precision(node: Training) -> str:
    """The name of a stage's precision on this machine."""
    from llmkit.build.precision import types
    from llmkit.core.memory import device

    return types(node.types_name, device()).name


def short(node: Training, steps: int | None) -> list[str]:
    """Overrides that leave the step as it is and make the run short; without dropout, whose noise is not the same."""
    said = ["epochs=null", "push=null", "log=[]", *([f"steps={steps}"] if steps else [])]
    if node.data.sources("valid"):
        said += ["evaluate.rows=1", "evaluate.samples=0"]
    return said + (["adapter.dropout=0"] if getattr(node.adapter, "dropout", 0.0) else [])


def _run(path: str, overrides: Sequence[str], way: Way, folder: Path) -> Path:
    """The folder of a run.

    Raises:
        LlmkitError: it failed; with what it said, and its exit status.
    """
    made, said = folder / f"{way.ranks}-{way.micro_batch}", folder / "said.txt"
    command = [sys.executable, "-m", "llmkit", "run", path, *overrides]
    command += [f"micro_batch={way.micro_batch}", f"out={made}"]
    with said.open("w") as heard:
        begun = [
            subprocess.Popen(command, env=place, stdout=subprocess.DEVNULL, stderr=heard)
            for place in environments(way.ranks)
        ]
        codes = [process.wait() for process in begun]
    if any(codes):
        lines = [line for line in said.read_text().splitlines() if "error:" in line]
        why, _, fix = (lines[0].partition("error: ")[2] if lines else "it said nothing").partition("; fix: ")
        many = f"{way.ranks} ranks" if way.ranks > 1 else "one process"
        what = f"{many} with a micro-batch of {way.micro_batch} cannot be run: {why}"
        kinds = {kind.code: kind for kind in (RecipeError, DataError, ModelError, ResourceError)}
        kind = kinds.get(next(code for code in codes if code), PeerError)
        raise kind(what, fix=fix or "see to it that the recipe runs that way")
    return made


def environments(world: int) -> Iterator[dict[str, str]]:
    """What a launcher would tell each of `world` ranks on this machine."""
    port = free_port()
    for rank in range(world):
        yield os.environ | Ranks(rank, world, rank, world).environment(port)


def _seen(way: Way, made: Path, first: Path) -> Seen:
    ours = _figures(made)
    return Seen(way.ranks, way.micro_batch, ours["loss"], ours["grad_norm"], *apart(made, first))


def apart(made: Path, first: Path) -> tuple[float, float]:
    """The largest relative difference of losses and gradient norms of two runs, and of their trained weights."""
    ours, theirs = _figures(made), _figures(first)
    pairs = [pair for key in ours for pair in zip(ours[key], theirs[key], strict=True)]
    gap = max(abs(a - b) / max(abs(b), 1e-12) if isfinite(a) and isfinite(b) else inf for a, b in pairs)
    return gap, _weights(made, first)


def _figures(folder: Path) -> dict[str, tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    return {key: tuple(float(line[key]) for line in steps) for key in ("loss", "grad_norm")}


def _weights(made: Path, first: Path) -> float:
    ours, theirs = _held(made / "model"), _held(first / "model")
    return max(float((ours[name] - b).abs().max() / b.abs().max().clamp(min=1e-12)) for name, b in theirs.items())


def learned(made: Path, first: Path, start: Path) -> float:
    """How far the weights of two runs are from each other, of how far the first one's are from where they began."""
    ours, theirs, before = _held(made / "model"), _held(first / "model"), _held(start)
    apart = sum(float((ours[name] - b).double().square().sum()) for name, b in theirs.items())
    moved = sum(float((b - before[name]).double().square().sum()) for name, b in theirs.items())
    return math.sqrt(apart / max(moved, 1e-24))


def _held(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor.float() for f in folder.glob("*.safetensors") for name, tensor in load_file(f).items()}


def _table(found: Sequence[Seen], tolerance: float) -> Iterator[str]:
    yield f"{'ranks':>5} {'micro-batch':>11}  {'losses':<24} {'gradient norms':<24} {'gap':>9} {'weights':>9}"
    for seen in found:
        losses, norms = (", ".join(f"{x:.6f}" for x in numbers) for numbers in (seen.losses, seen.grad_norms))
        figures = f"{losses:<24} {norms:<24} {seen.gap:9.1e} {seen.weights:9.1e}"
        yield f"{seen.ranks:5} {seen.micro_batch:11}  {figures}" + ("" if seen.gap <= tolerance else "  too far")
    worst = max(seen.gap for seen in found)
    word = "agree" if worst <= tolerance else "do not agree"
    yield f"{len(found)} ways to cut up a step {word}: {worst:.1e} at most, {tolerance:.0e} allowed"
