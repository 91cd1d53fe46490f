"""Sending a result to the Hugging Face Hub, when it is asked for and never else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmkit.core.config import Conflict, config
from llmkit.core.errors import ResourceError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@config
class Push:
    """The result goes to the Hub, in one commit with a model card made from the manifest."""

    repo: str
    """`OWNER/NAME`; made when it is not there."""
    private: bool = True
    """Whether a repository that is made is private."""
    revision: str | None = None
    """A branch, which must be there; without it `main`."""

    def problems(self) -> Iterator[Conflict]:
        """A name that is none."""
        if not NAME.fullmatch(self.repo):
            yield Conflict("repo", f"{self.repo!r} is no OWNER/NAME", "write both, such as me/my-model")

    def send(self, folder: Path) -> str:
        """Sends `model/` of a run's folder; gives the commit's address.

        Raises:
            ResourceError: the Hub cannot be reached, or refuses.
        """
        return send(folder, self)


def files(folder: Path) -> list[tuple[str, Path]]:
    """What is sent beside the card: (name there, path here)."""
    model = folder / "model"
    return [(str(path.relative_to(model)), path) for path in sorted(model.rglob("*")) if path.is_file()]


def send(folder: Path, node: Push) -> str:
    """As `Push.send`."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from llmkit.stages.card import card

    api: Any = HfApi()
    parts = [CommitOperationAdd(name, str(path)) for name, path in files(folder)]
    parts.append(CommitOperationAdd("README.md", card(folder).encode()))
    try:
        api.create_repo(node.repo, private=node.private, exist_ok=True)
        made = api.create_commit(node.repo, parts, commit_message=f"{folder.name} by llmkit", revision=node.revision)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ConnectionError) as cause:
        why = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
        fix = f"log in with `hf auth login`, then: llmkit push {folder} {node.repo}"
        raise ResourceError(f"the Hub refuses {node.repo} ({why}); the result is whole", fix=fix, key="push") from cause
    return str(made.commit_url)
