"""The `reward` union: what an answer is worth. A recipe gives one or a list of them, whose weighted sum counts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmkit.core.config import Conflict, Duration, config, setting
from llmkit.core.hints import kind_of
from llmkit.rl.sample import Fault, Sample, Score
from llmkit.rl.shapes_node import Shape

if TYPE_CHECKING:
    from llmkit.rl.bench import Bench
    from llmkit.rl.checked import Check, Told

NAME = re.compile(r"[A-Za-z0-9_.-]+")


@config
class Weighed:
    """What every reward has."""

    kind: str = ""
    name: str = ""
    """What its figures are called; without it, its kind."""
    weight: float = 1.0
    """What its score is multiplied by in the sum; at 0 it is only told."""

    def problems(self) -> Iterator[Conflict]:
        """A name that would be no figure's."""
        if self.name and not NAME.fullmatch(self.name):
            yield Conflict("name", f"{self.name!r} is no plain name", "use letters, digits, _, - and .")


@config
class Checked(Weighed):
    """What is computed in processes of its own, so that no answer can hang a run or end it."""

    timeout: Duration = setting(default=10.0, above=0)
    """For one answer."""
    failed: float | None = None
    """What an answer gets that is the end of its process, takes too long or makes the reward fail; such answers are
    counted. Left out, the run ends with an error that names the row."""

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each, or why it has none.

        Raises:
            RecipeError: it is not what it should be.
            ResourceError: what it needs is not installed.
        """
        from llmkit.rl.workers import Workers

        workers = bench.kept(_key(self), lambda: Workers(asdict(self), self.timeout, self.sent))
        return workers.each(samples, self.failed is None) if samples else []

    def sent(self, sample: Sample) -> Told:
        """What the process is told of a sample."""
        return {"completion": sample.completion}

    def check(self) -> Check:
        """The reward, ready: called in the process."""
        raise NotImplementedError


def _key(reward: Checked) -> str:
    """What its processes are known by: those that differ in weights alone share them."""
    return repr(replace(reward, name="", weight=1.0, failed=None))


def _with(sample: Sample, column: str) -> Told:
    """An answer and one column of its row."""
    row = {column: sample.row[column]} if column in sample.row else {}
    return {"completion": sample.completion, "row": row, "named": list(sample.row)[:12]}


def _bad_pattern(key: str, pattern: str | None) -> Iterator[Conflict]:
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as cause:
        yield Conflict(key, f"{pattern[:60]!r} is no regular expression ({cause})", "mend it")


@config
class Maths(Checked):
    """1 where the answer is worth what the reference is, as math-verify reads both (`pip install 'llmkit[maths]'`):
    fractions and decimals, sets, intervals, equations, LaTeX or plain; else 0."""

    kind: Literal["math"] = "math"
    column: str = "answer"
    """Where the reference is: a formula, a solution that ends in one, or GSM8K's text with ####."""
    where: Literal["anywhere", "boxed"] = "anywhere"
    """Whether only what the last \\boxed{} holds is an answer."""

    def sent(self, sample: Sample) -> Told:
        """The answer and the reference."""
        return _with(sample, self.column)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.maths import check

        return check(self.column, self.where)


@config
class Pattern(Checked):
    """1 where a regular expression is found in the answer, else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str
    whole: bool = False
    """Whether it must match all of the answer."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern that is none."""
        yield from super().problems()
        yield from _bad_pattern("pattern", self.pattern)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.checked import each

        made = re.compile(self.pattern)
        find = made.fullmatch if self.whole else made.search
        return each(lambda told: find(told["completion"]) is not None)


@config
class Exact(Checked):
    """1 where the answer is the text of a column, else 0."""

    kind: Literal["exact"] = "exact"
    column: str = "answer"
    extract: str | None = None
    """A regular expression: its last match in the answer (or the first group of it) is compared, and that in the
    column where it is found there."""
    ignore: tuple[Literal["space", "case", "punctuation"], ...] = ("space",)
    """What makes no difference: more or less space, capitals, or what is neither letter, digit nor space."""

    def problems(self) -> Iterator[Conflict]:
        """A pattern that is none."""
        yield from super().problems()
        yield from _bad_pattern("extract", self.extract)

    def sent(self, sample: Sample) -> Told:
        """The answer and the reference."""
        return _with(sample, self.column)

    def check(self) -> Check:
        """In the process."""
        from llmkit.rl.checked import column_of, each, last_match

        made = re.compile(self.extract) if self.extract is not None else None

        def score(told: Told) -> float:
            wanted, said = column_of(told, self.column), told["completion"]
            if made is not None:
                found = last_match(made, said)
                if found is None:
                    return 0.0
                wanted, said = last_match(made, wanted) or wanted, found
            return float(self._plain(wanted) == self._plain(said))

        return each(score)

    def _plain(self, text: str) -> str:
        if "punctuation" in self.ignore:
            text = "".join(c for c in text if c.isalnum() or c.isspace())
        if "case" in self.ignore:
            text = text.casefold()
        return " ".join(text.split()) if "space" in self.ignore else text


@config
class Schema(Checked):
    """1 where the answer is JSON that a schema allows, else 0 (`pip install 'llmkit[schema]'`)."""

    kind: Literal["json_schema"] = "json_schema"
    schema: str = ""
    """The schema, as JSON text; or `path`. What it refers to elsewhere is not fetched."""
    path: str = ""
    """A file that holds it."""
    where: Literal["whole", "fenced"] = "whole"
    """Whether the whole answer is JSON, or what its last ``` fence holds."""

    def problems(self) -> Iterator[Conflict]:
        """No schema, or two."""
        yield from super().problems()
        if bool(self.schema) == bool(self.path):
            what = "neither schema nor path is given" if not self.schema else "the schema is in a file and here"
            yield Conflict("schema", what, "give one of the two", "path" if self.schema else "")

    def check(self) -> Check:
        """In the process."""
        from llmkit.core.errors import RecipeError
        from llmkit.rl.schema import check

        try:
            text = Path(self.path).expanduser().read_text("utf-8") if self.path else self.schema
        except (OSError, ValueError) as cause:
            why = getattr(cause, "strerror", None) or "is not UTF-8"
            raise RecipeError(f"{self.path} cannot be read ({why})", fix="name a file of JSON", key="path") from cause
        return check(text, self.where)


@config
class Length(Weighed):
    """What the answer's length is worth."""

    kind: Literal["length"] = "length"
    shape: Shape
    unit: Literal["tokens", "characters", "words"] = "tokens"

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each."""
        return [self._of(sample) for sample in samples]

    def _of(self, sample: Sample) -> Score:
        if self.unit != "tokens":
            return self.shape.worth(len(sample.completion if self.unit == "characters" else sample.completion.split()))
        if sample.completion and not sample.token_ids:
            return Fault("tells no tokens, as the answer of an endpoint", "set unit: characters or words", True)
        return self.shape.worth(len(sample.token_ids))


@config
class Format(Weighed):
    """1 where the answer is made of sections in tags, each once and in this order, else 0."""

    kind: Literal["format"] = "format"
    tags: tuple[str, ...] = ("think", "answer")
    rest: bool = False
    """Whether text may follow the last section; none may stand before the first or between them."""
    begun: bool = False
    """Whether the prompt has opened the first one already."""

    def problems(self) -> Iterator[Conflict]:
        """No tags, or such as are none."""
        yield from super().problems()
        if not self.tags or len(set(self.tags)) < len(self.tags) or not all(map(NAME.fullmatch, self.tags)):
            yield Conflict("tags", "is no list of different names", "give some, such as [think, answer]")

    def score(self, samples: Sequence[Sample], bench: Bench) -> list[Score]:
        """A score for each."""
        from llmkit.rl.format import sections

        return [sections(sample.completion, self.tags, self.rest, self.begun) for sample in samples]


@config
class Python(Checked):
    """A function of your own, `score(prompts, completions, **columns) -> numbers`, in a process of its own: it gets the
    rows' columns by name, `completion_ids` and `finish_reasons`; those that it does not take are left out. Prompts and
    completions are texts, or lists of messages where prompts are. It runs if `--allow-python` was given once for the
    file as it is; what the file imports is not looked at."""

    kind: Literal["python"] = "python"
    ref: str
    """FILE.py:FUNCTION, such as ./my.py:score."""
    timeout: Duration = setting(default=10.0, above=0)
    """For one call, with all answers of a step."""

    def problems(self) -> Iterator[Conflict]:
        """A name of no function."""
        from llmkit.core.usercode import unreadable

        yield from super().problems()
        yield from unreadable(self.ref)

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

        workers = bench.kept(_key(self), begun)
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


Reward = Maths | Pattern | Exact | Schema | Length | Format | Python

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
