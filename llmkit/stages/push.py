"""Sending a result to the Hugging Face Hub, when it is asked for and never else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from llmkit.core.config import Conflict, config

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
        from llmkit.stages.upload import send

        return send(folder, self)
