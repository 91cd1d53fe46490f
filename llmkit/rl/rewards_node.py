"""The `reward` union: what an answer is worth. A recipe gives one or a list of them, whose weighted sum counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import Conflict, Duration, config, setting
from llmkit.core.hints import kind_of
from llmkit.models.node import ModelRef
from llmkit.rl.asked_node import Judge, Model
from llmkit.rl.checked_node import Checked, Lack, key_of
from llmkit.rl.sample import Sample, Score
from llmkit.rl.verifiers_node import Exact, Format, Length, Maths, Pattern, Schema

if TYPE_CHECKING:
    from llmkit.rl.bench import Bench
    from llmkit.rl.checked import Check, Told

__all__ = ["Exact", "Format", "Judge", "Length", "Maths", "Model", "Pattern", "Python", "Reward", "Schema"]


@config
class Python(Checked):
    """A function of your own, `score(prompts, completions, **columns) -> numbers`, in a process of its own: it gets the
    rows' columns by name, `completion_ids` and `finish_reasons`; those that it does not take are left out. Prompts and
    completions are texts, or lists of messages where prompts are; of a conversation with tools a completion is all of
    its messages. It runs if `--allow-python` was given once for the
    file as it is; what the file imports is not looked at."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:FUNCTION, such as ./my.py:score."""
    timeout: Duration = setting(default=10.0, above=0)
    """For one call, with all answers of a step."""

    def files(self) -> dict[str, str]:
        """The function's."""
        return {"ref": self.ref.rpartition(":")[0]}

    def problems(self) -> Iterator[Conflict]:
        """A name of no function."""
        from llmkit.core.usercode import unreadable

        yield from super().problems()
        yield from unreadable(self.ref)

    def lacks(self, rows: Sequence[Mapping[str, Any]]) -> Lack | None:
        """Where no row has a column that the function cannot do without, the first.

        Raises:
            RecipeError: there is no such function.
        """
        from llmkit.core.usercode import looked_at
        from llmkit.rl.own import OURS

        columns = dict.fromkeys(name for row in rows for name in row)
        wanted = [name for name in looked_at(self.ref).wanted if name not in (*OURS, *columns)]
        if not rows or not wanted:
            return None
        what = f"{self.ref.rpartition(':')[2]} asks for {wanted[0]}, which the rows have no column of"
        return Lack(0, "ref", what, f"give it a default; there is {', '.join((*columns, *OURS))}")

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each, or why it has none.

        Raises:
            RecipeError: nobody allowed the file, or it has no such function.
        """
        from llmkit.core.usercode import allowed
        from llmkit.rl.workers import Workers

        def begun() -> Workers:
            allowed(self.ref, bench.grants.python)
            return Workers(asdict(self), self.timeout, self.sent, 1)

        workers = bench.kept(key_of(self), begun)
        return workers.together(samples) if samples else []

    def sent(self, sample: Sample) -> Told:
        """All that is known of it."""
        said: dict[str, Any] = {"prompts": sample.prompt, "completions": sample.said, "row": sample.row}
        return said | {"completion_ids": sample.token_ids, "finish_reasons": sample.finish_reason}

    def check(self) -> Check:
        """In the process, which reads the file anew: as long as it is what was allowed."""
        from llmkit.core.usercode import allowed
        from llmkit.rl.own import check

        return check(allowed(self.ref, False))


Reward = Maths | Pattern | Exact | Schema | Length | Format | Model | Judge | Python

PROCESSES: dict[str, type[Checked]] = {kind_of(cls): cls for cls in (Maths, Pattern, Exact, Schema, Python)}
"""Those that score in processes, by kind."""


def opened(said: Mapping[str, Any]) -> Check:
    """A reward, ready, of what a process was told."""
    return PROCESSES[said["kind"]](**said).check()


def names(rewards: Sequence[Reward]) -> list[str]:
    """What each one's figures are called: where two have one name, the later ones are numbered."""
    said: list[str] = []
    for reward in rewards:
        name, again = reward.name or reward.kind, 2
        while name in said:
            name, again = f"{reward.name or reward.kind}_{again}", again + 1
        said.append(name)
    return said


def placed(rewards: Reward | Sequence[Reward]) -> list[tuple[str, Reward]]:
    """Each by its place in a recipe: one that is written without a list has no number."""
    if isinstance(rewards, Sequence):
        return [(f"reward.{at}", one) for at, one in enumerate(rewards)]
    return [("reward", rewards)]


def models_of(rewards: Reward | Sequence[Reward]) -> dict[str, ModelRef]:
    """The models that rewards read, by their keys."""
    return {f"{place}.{name}": ref for place, one in placed(rewards) for name, ref in one.models().items()}


def files_of(rewards: Reward | Sequence[Reward]) -> dict[str, str]:
    """The files that rewards read, by their keys."""
    return {f"{place}.{name}": path for place, one in placed(rewards) for name, path in one.files().items()}


def twice(rewards: Sequence[Reward], key: str = "reward") -> Iterator[Conflict]:
    """Names that two rewards were given, and lists of none."""
    if not rewards:
        yield Conflict(key, "is empty", "name at least one")
    given = [reward.name for reward in rewards if reward.name]
    for name in sorted({name for name in given if given.count(name) > 1}):
        yield Conflict(key, f"two rewards are called {name}", "give each its own name")
