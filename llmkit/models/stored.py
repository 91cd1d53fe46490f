"""Single weights as a model's files hold them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llmkit.core.errors import ModelError


class Stored:
    """The weights of a folder whose files have been checked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, dict[str, Path]()

    def __call__(self, name: str) -> Tensor:
        """The weight of that name.

        Raises:
            ModelError: the files have none of that name.
        """
        from safetensors import safe_open

        if not self.place:
            for file in sorted(self.folder.glob("*.safetensors")):
                with safe_open(file, "pt") as held:
                    self.place.update(dict.fromkeys(held.keys(), file))
        if name not in self.place:
            what = f"the files call no weight {name}, as the loaded model does"
            raise ModelError(what, fix="use adapter.init=default", key="adapter.init", file=str(self.folder))
        with safe_open(self.place[name], "pt") as held:
            made: Tensor = held.get_tensor(name)
        return made
