"""What a run must have in common with the one that it continues."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmkit.core.errors import Problem, RecipeError
from llmkit.core.files import sha256
from llmkit.core.folder import differences
from llmkit.core.wording import cut

PACKAGES = (
    "llmkit",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "numpy",
    "bitsandbytes",
    "safetensors",
    "deepspeed",
)


def packages() -> dict[str, str]:
    """The installed version of each package that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code() -> dict[str, str]:
    """The beginning of the sha256 of each of our own files: what ranks run must be one thing."""
    ours = Path(__file__).parents[1]
    kernels = importlib.util.find_spec("llmkit_kernels")
    roots = [ours, *map(Path, (kernels.submodule_search_locations or ()) if kernels is not None else ())]
    files = [(root, path) for root in roots for kind in ("*.py", "*.cpp") for path in root.rglob(kind)]
    return {str(path.relative_to(root.parent)): sha256(path)[:12] for root, path in sorted(files)}


def processor() -> str:
    """The kind of processor: kernels are compiled for it, and results are equal to the bit on one kind alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def compare(old: Mapping[str, Any], new: Mapping[str, Any], accept: Sequence[str]) -> list[str]:
    """Sees to it that a resumed run is the same run; gives the accepted differences in words.

    Raises:
        RecipeError: something else differs: one problem a key, with both values.
    """
    found = differences(old, new)
    wrong = [change for change in found if not _accepted(change[0], accept)]
    if wrong:
        raise RecipeError(
            problems=[
                Problem(
                    f"was {_short(before)} when the run began and is {_short(now)}",
                    f"restore it, or pass --accept {key}",
                    key=key,
                )
                for key, before, now in wrong
            ]
        )
    return [f"{key}: {_short(before)} -> {_short(now)}" for key, before, now in found]


def unmeant(old: Mapping[str, Any], new: Mapping[str, Any], accept: Sequence[str]) -> list[str]:
    """What is accepted and is no key of either run, each in words, with the nearest key; another stage may have it."""
    keys = sorted({*_keys(old), *_keys(new)})
    short = [key.removeprefix("recipe.").removeprefix("environment.") for key in keys]
    told = []
    for name in accept:
        if not any(_accepted(key, (name,)) for key in keys):
            near = get_close_matches(name, short, 1) or [key for key in short if key.endswith(f".{name}")][:1]
            told.append(f"--accept {name} names no key of this run" + (f", did you mean {near[0]}?" if near else ""))
    return told


def _keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def _accepted(key: str, accept: Sequence[str]) -> bool:
    places = [f"{place}{name}" for name in accept for place in ("", "recipe.", "environment.")]
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _short(value: Any) -> str:
    return cut("absent" if value is None else str(value), 48)
