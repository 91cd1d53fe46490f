"""The files of a result, and how they go to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.core.errors import ResourceError
from llmkit.stages.card import card
from llmkit.stages.places import content
from llmkit.stages.push import Push


def files(folder: Path) -> list[tuple[str, Path]]:
    """What is sent beside the card: (name there, path here)."""
    model = folder / "model"
    return [(str(path.relative_to(model)), path) for path in sorted(model.rglob("*")) if path.is_file()]


def send(folder: Path, node: Push) -> str:
    """As `Push.send`."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api: Any = HfApi()
    sent = [(name, content(path)) for name, path in files(folder)]
    parts = [CommitOperationAdd(name, part if isinstance(part, bytes) else str(part)) for name, part in sent]
    parts.append(CommitOperationAdd("README.md", card(folder).encode()))
    try:
        api.create_repo(node.repo, private=node.private, exist_ok=True)
        made = api.create_commit(node.repo, parts, commit_message=f"{folder.name} by llmkit", revision=node.revision)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ConnectionError) as cause:
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        fix = f"log in with `hf auth login`, then: llmkit push {folder} {node.repo}"
        raise ResourceError(f"the Hub refuses {node.repo} ({why}); the result is whole", fix=fix, key="push") from cause
    return str(made.commit_url)
