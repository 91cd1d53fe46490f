"""What a stage leaves: a folder and a manifest that names every file by its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.core.errors import ModelError
from llmkit.core.files import DISK, Disk, sha256, write_json

FORMAT = 1
LIVING = ("checkpoints", "tensorboard", "wandb", "mlruns", "comet")
"""Folders of what is no part of the result, or lives on."""
UNLISTED = {"status.json", ".lock", "manifest.json", "run.log"}


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """What the stage was made from.

        Raises:
            ModelError: it is missing or damaged.
        """
        path = self.folder / "manifest.json"
        try:
            said = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as cause:
            why = cause.strerror if isinstance(cause, OSError) else "is not JSON"
            raise ModelError(f"cannot be read ({why})", fix="run the stage again", file=str(path)) from cause
        if not isinstance(said, dict) or not isinstance(said.get("files"), dict):
            raise ModelError("is no manifest: it lists no files", fix="run the stage again", file=str(path))
        return said

    def model(self) -> Path:
        """The path of the Hugging Face folder, for transformers or peft; nothing is loaded."""
        return self.folder / "model"

    def verify(self, under: str = "") -> None:
        """Reads every file below `under` again.

        Raises:
            ModelError: a file is missing or is not the one that the manifest names.
        """
        for name, digest in self.manifest["files"].items():
            if not name.startswith(under):
                continue
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                state = "has changed" if path.is_file() else "is missing"
                raise ModelError(f"{state} since the run ended", fix="run the stage again", file=str(path))


def publish(folder: Path, facts: Mapping[str, Any], disk: Disk = DISK) -> Artifact:
    """Writes the manifest over all files but checkpoints and logs that live on, when all of them are on the disk."""
    listed = [path for path in sorted(folder.rglob("*")) if not _passing(path.relative_to(folder))]
    files = {str(path.relative_to(folder)): sha256(path) for path in listed if path.is_file()}
    for path in [*listed, folder]:
        disk.sync(path)
    write_json(folder / "manifest.json", {"format": FORMAT, **facts, "files": files})
    return Artifact(folder)


def _passing(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.parts[0] in LIVING or path.name in UNLISTED or hidden
