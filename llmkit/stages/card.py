"""The model card of a result: a README for the Hub, generated from the manifest and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmkit.core.artifact import Artifact
from llmkit.core.metrics import Lines
from llmkit.stages.page import figures
from llmkit.stages.places import named, without_places

LIBRARIES = {"adapter_config.json": "peft", "config.json": "transformers"}


def card(folder: Path) -> str:
    """The README of a run's `model/`: YAML that the Hub reads, and what the result was made from.

    Raises:
        ModelError: the run has no manifest.
    """
    manifest = Artifact(folder).manifest
    return f"---\n{yaml.safe_dump(_header(folder, manifest), sort_keys=False)}---\n\n{_body(folder, manifest)}"


def _header(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    library = next((name for file, name in LIBRARIES.items() if (folder / "model" / file).is_file()), "transformers")
    base = str(manifest["base"].get("source", "")).removeprefix("hub:")
    known = {"base_model": base} if "/" in base and not base.startswith(("/", ".")) else {}
    return {"library_name": library, **known, "tags": ["llmkit", str(manifest["kind"])]}


def _body(folder: Path, manifest: Mapping[str, Any]) -> str:
    base, recipe = named(manifest["base"]), dict(manifest.get("recipe", {}))
    recipe.pop("push", None)
    recipe |= {"model": _model(recipe["model"], base)} if "model" in recipe else {}
    name = base.get("name") or base.get("source")
    made = [f"# {folder.resolve().name}", "", f"{name}, trained by llmkit (`kind: {manifest['kind']}`).", ""]
    rows = figures(Lines(folder / "metrics.jsonl").read(), Lines(folder / "evals.jsonl").read())
    if rows:
        made += ["## Figures", "", "| | value | |", "|---|---|---|"]
        made += [f"| {key} | {value} | {remark} |" for key, value, remark in rows] + [""]
    facts = {
        "base model": name,
        "revision": base.get("revision"),
        "sha256 of the weights": base.get("sha256"),
        "examples": manifest.get("samples"),
        "steps": manifest.get("step"),
        "precision": manifest.get("precision"),
        "seed": manifest.get("seed"),
        "packages": ", ".join(f"{key} {value}" for key, value in manifest.get("packages", {}).items()),
    }
    made += ["## Made from", ""] + [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "")]
    shown = yaml.safe_dump(without_places(recipe), sort_keys=False)
    return "\n".join([*made, "", "## Recipe", "", f"```yaml\n{shown}```", ""])


def _model(said: Any, base: Mapping[str, Any]) -> Any:
    """The recipe's model, where it was a folder by what that is called."""
    if base.get("source") != "folder":
        return said
    return {**said, "name": base["name"]} if isinstance(said, Mapping) else base["name"]
