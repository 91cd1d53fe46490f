"""`llmkit prove speculation [MODEL]`: runs the certificate on this build; no network, no files."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmkit import __version__
from llmkit.cli.acceptance.verdict import FORMAT, Check, lines, part, verdict
from llmkit.cli.recipes import out
from llmkit.cli.speculation.parts import PARTS, Asked, Job
from llmkit.core.console import Console
from llmkit.core.environment import prepare as quiet_libraries
from llmkit.core.errors import RecipeError
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve


def speculation(said: Asked, only: str, as_json: bool) -> int:
    """Proves what was asked for; 0 if nothing failed and something passed, 1 if not.

    Raises:
        RecipeError: there is no such part.
        ModelError: there is no such model.
    """
    wanted = [name for name in only.split(",") if name] or [name for name in PARTS if said.model or name != "model"]
    if unknown := [name for name in wanted if name not in PARTS]:
        raise RecipeError(f"{unknown[0]} is no part of this proof", fix=f"use --only {','.join(PARTS)}")
    if "model" in wanted and not said.model:
        raise RecipeError("the part model needs one", fix="name a model: llmkit prove speculation MODEL --only model")
    quiet_libraries()
    if said.model and "model" in wanted:
        resolve(ModelRef(name=said.model))  # a name that is none is told before anything takes its time
    jobs = {name: PARTS[name](said) for name in wanted}
    parts = proved(jobs)
    word = verdict(parts)
    whole = {"format": FORMAT, "llmkit": __version__, "python": platform.python_version(), "asked": asdict(said)}
    whole |= {"compiled": _compiled(), "verdict": word, "parts": parts}
    out(json.dumps(whole) if as_json else "\n".join([*lines(parts), f"{word}: {_compiled() or 'nothing'} compiled"]))
    return 1 if word == "failed" else 0


def proved(jobs: Mapping[str, Sequence[Job]]) -> dict[str, dict[str, Any]]:
    """All parts, with a progress over their pieces of work."""
    console, done, total = Console(), 0, sum(map(len, jobs.values()))
    made: dict[str, dict[str, Any]] = {}
    console.start("proving speculation", total)
    try:
        for name, some in jobs.items():
            began, checks = time.monotonic(), list[Check]()
            for job in some:
                checks += job()
                done += 1
                console.step("proving speculation", done, total, name)
            made[name] = part(checks, time.monotonic() - began)
    finally:
        console.end()
    return made


def _compiled() -> str:
    from llmkit_kernels.build import lacks

    return ", ".join(name for name in ("linear", "paged", "draw") if not lacks(name))
