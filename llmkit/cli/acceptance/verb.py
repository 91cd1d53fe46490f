"""`llmkit prove cluster`: started by a launcher on all ranks, or on one machine by itself."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any

from llmkit import __version__
from llmkit.cli.acceptance.bars import Bars
from llmkit.cli.acceptance.collectives import collectives
from llmkit.cli.acceptance.equality import equality
from llmkit.cli.acceptance.faults import faults
from llmkit.cli.acceptance.made import prepare
from llmkit.cli.acceptance.planner import planner
from llmkit.cli.acceptance.scaling import scaling
from llmkit.cli.acceptance.trials import COMMAND, Kit
from llmkit.cli.acceptance.verdict import FORMAT, Check, lines, part, verdict
from llmkit.cli.prove import environments
from llmkit.cli.recipes import out
from llmkit.core.environment import prepare as quiet_libraries
from llmkit.core.errors import RecipeError
from llmkit.core.files import write_json
from llmkit.core.memory import device
from llmkit.core.peers import Alone
from llmkit.core.ranks import Ranks, ranks

PARTS: dict[str, Callable[[Kit], list[Check]]] = {
    "collectives": collectives,
    "equality": equality,
    "faults": faults,
    "scaling": scaling,
    "planner": planner,
}


def cluster(recipe: str, overrides: Sequence[str], asked: int, to: str, only: str, as_json: bool) -> int:
    """Proves what was asked for; 0 if nothing failed and something passed, 1 if not.

    Raises:
        RecipeError: the recipe is not one stage that trains, or there is no such part.
    """
    wanted = [name for name in only.split(",") if name] or list(PARTS)
    if unknown := [name for name in wanted if name not in PARTS]:
        raise RecipeError(f"{unknown[0]} is no part of a proof", fix=f"use --only {','.join(PARTS)}")
    mine = ranks()
    if mine.world == 1:
        world = asked or _devices()
        if world > 1:
            options = {"--recipe": recipe, "--out": to, "--only": only}
            given = [word for name, value in options.items() if value for word in (name, value)]
            return _started(world, ["prove", "cluster", *given, *(["--json"] if as_json else []), *overrides])
    elif asked:
        raise RecipeError(f"the launcher says {mine.world} ranks, and --ranks {asked}", fix="drop --ranks")
    return prove(mine, recipe, overrides, Path(to), wanted, as_json)


def prove(
    mine: Ranks,
    recipe: str,
    overrides: Sequence[str],
    to: Path,
    wanted: Sequence[str],
    as_json: bool = False,
    bars: Bars = Bars(),
    command: Sequence[str] = COMMAND,
) -> int:
    """On one rank of the kit: all parts, the JSON and the table."""
    quiet_libraries()
    from llmkit.parallel.group import joined

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # children are ended on the way out
    kind = device()
    with joined(mine, "cpu") if mine.world > 1 else nullcontext(Alone()) as peers:
        folder = Path(peers.share(_folder(to) if mine.main else ""))
        own = Path(recipe).resolve() if recipe else None
        kit = Kit(peers, folder, kind, bars, own, overrides, command)
        try:
            prepare(kit)
            parts = {name: _part(kit, name, name in wanted) for name in PARTS}
            word = verdict({name: parts[name] for name in wanted})
            if mine.main:
                _leave(_whole(kit, parts, verdict(parts), recipe), to, as_json)
        finally:
            if mine.main:
                rmtree(folder, ignore_errors=True)
        return 1 if word == "failed" else 0


def _part(kit: Kit, name: str, wanted: bool) -> dict[str, Any]:
    if not wanted:
        return part([], 0.0) | {"why": "not asked for"}
    begun = time.monotonic()
    if kit.peers.ranks.main:
        sys.stderr.write(f"llmkit: proving {name}\n")
        sys.stderr.flush()
    return part(PARTS[name](kit), time.monotonic() - begun)


def _whole(kit: Kit, parts: dict[str, dict[str, Any]], word: str, recipe: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "llmkit": __version__,
        "python": platform.python_version(),
        "world": kit.world,
        "device": kit.device,
        "recipe": recipe or None,
        "overrides": list(kit.overrides),
        "verdict": word,
        "parts": parts,
        "bars": asdict(kit.bars),
    }


def _leave(whole: dict[str, Any], to: Path, as_json: bool) -> None:
    write_json(to, whole)
    if as_json:
        out(json.dumps(whole))
        return
    out("\n".join(lines(whole["parts"])))
    out(f"{whole['verdict']}: {whole['world']} ranks on {whole['device']}; {to}")


def _folder(to: Path) -> str:
    """Beside the JSON: what all ranks must reach."""
    to.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".llmkit-prove-", dir=to.resolve().parent)


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 2


def _started(world: int, words: Sequence[str]) -> int:
    """Ranks of this machine, as a launcher would start them."""
    begun = [subprocess.Popen([*COMMAND, *words], env=place) for place in environments(world)]
    try:
        codes = [process.wait() for process in begun]
    finally:
        for process in begun:
            if process.poll() is None:
                process.terminate()
    return next(filter(None, codes), 0)
