"""The verbs around the work: fetch, recipes, doctor and its table of support."""

from __future__ import annotations

import difflib
import json
import shutil
import sys
from pathlib import Path

from llmkit.core.environment import prepare
from llmkit.core.errors import RecipeError
from llmkit.models import support as table
from llmkit.models.kinds import missing
from llmkit.recipe import shipped


def fetch(name: str, as_json: bool) -> None:
    """Brings a model into the cache and prints where it is."""
    prepare(remote=True)
    from llmkit.models.node import ModelRef
    from llmkit.models.resolve import resolve

    found = resolve(ModelRef(name=name))
    if as_json:
        facts = {"path": str(found.folder), "source": found.source, "revision": found.revision, "sha256": found.sha256}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        sys.stdout.write(f"{found.folder}\n")


def recipes(name: str) -> None:
    """Lists recipes with the comment that each begins with, or copies one."""
    found = shipped.recipes()
    if not name:
        wide = max(map(len, found))
        for short, path in found.items():
            first = path.read_text().splitlines()[0].removeprefix("# ")
            sys.stdout.write(f"{short:{wide}}  {first.split('. ')[0]}\n")
        return
    if name not in found:
        near = difflib.get_close_matches(name, found, 1, 0.5)
        fix = f"llmkit recipes {near[0]}" if near else "`llmkit recipes` lists them"
        raise RecipeError(f"{name} is no shipped recipe", fix=fix)
    target = Path(found[name].name)
    if target.exists():
        raise RecipeError(f"{target} is here already", fix="move it away first")
    shutil.copyfile(found[name], target)
    sys.stdout.write(f"{target}\n")


def support(as_json: bool) -> None:
    """What each family of models supports, as it was measured for this release."""
    sys.stdout.write(json.dumps(table.measured()) + "\n" if as_json else table.text())


def doctor(as_json: bool) -> None:
    """Versions, devices, and which fast rows are live."""
    prepare()
    import torch
    from llmkit_kernels.table import rows as compiled_rows

    from llmkit.build.exactness import exactness_here
    from llmkit.checkpoint.identity import packages
    from llmkit.core.matmul import row
    from llmkit.core.memory import available

    lacks = {kind: missing(kind, torch.cuda.is_available()) for kind in ("flash", "flex", "sdpa", "eager")}
    facts = {
        "packages": packages(),
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "free_memory_mib": available("cuda" if torch.cuda.is_available() else "cpu") >> 20,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "families": f"{len(table.measured())} measured (llmkit doctor --support prints the table)",
        "supported": table.summary(table.measured()),
        "exact": exactness_here(),
        "rows": {
            "linear": row(),
            **{f"kernel {name}": how for name, how in compiled_rows().items()},
            **{f"attention {kind}": f"not live: {why}" if why else "live" for kind, why in lacks.items()},
        },
    }
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            sys.stdout.write(f"{key}:\n" + "".join(f"  {k:18} {v}\n" for k, v in value.items()))
        else:
            sys.stdout.write(f"{key}: {value}\n")
