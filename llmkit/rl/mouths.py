"""Several models that are asked in words: of those of this machine one at a time is held; endpoints stay open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from llmkit.core.run import Grants
from llmkit.rl.bench import Bench
from llmkit.rl.role_node import ELSEWHERE, Role
from llmkit.rl.sample import Messages
from llmkit.rl.speaker import Speaker, speaker


class Mouths:
    """Opens who is asked; `with Mouths(...) as mouths` gives back what is open."""

    def __init__(self, grants: Grants, device: str, precision: str) -> None:
        self.endpoints, self.here = (Bench(grants, device, precision) for _ in range(2))

    def __enter__(self) -> Mouths:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, role: Role, asked: Sequence[str | Messages], seed: int, count: int = 1) -> list[list[str]]:
        """`count` answers to each; where they are drawn, each ask has a seed of its own, from `seed` on.

        Raises:
            ModelError, ResourceError, RequestError: nobody answers.
        """
        if not asked:
            return []
        sampling = replace(role.sampling, seed=seed, n=count)
        return [[one.text for one in made.outputs] for made in self._opened(role).ask(asked, sampling)]

    def close(self) -> None:
        """Gives back what is open."""
        self.here.close()
        self.endpoints.close()

    def _opened(self, role: Role) -> Speaker:
        bench = self.endpoints if isinstance(role.generator, ELSEWHERE) else self.here
        key = repr((asdict(role.generator), role.model, role.quant))
        if bench is self.here and key not in bench.held:
            bench.close()  # before the next one is loaded
        return bench.kept(key, lambda: speaker(role.generator, role.model, bench, "model", role.quant))
