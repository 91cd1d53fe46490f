"""`llmkit generate --input`: a file of prompts to a file of answers, in order; run again after a stop, it goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.cli.questions import Question, checked, placed, questions
from llmkit.core.console import Console
from llmkit.core.errors import DataError, RecipeError
from llmkit.core.files import sha256, write_json
from llmkit.data.prompt import prompt_ids
from llmkit.data.render import Renderer
from llmkit.data.rows import Raw
from llmkit.inference.request import Completion, Prompt
from llmkit.inference.sampling import Sampling
from llmkit.inference.writer import Writer, seeded

if TYPE_CHECKING:
    from llmkit.build.llm import LLM


@dataclass(frozen=True)
class Work:
    """Where answers go: to `OUTPUT.part` until the last is there; `OUTPUT.part.json` says what they are of."""

    rows: Path
    output: Path
    facts: dict[str, Any]

    @property
    def part(self) -> Path:
        """The answers so far."""
        return self.output.with_name(self.output.name + ".part")

    @property
    def note(self) -> Path:
        """What the answers so far were asked with."""
        return self.part.with_name(self.part.name + ".json")

    def begin(self) -> int:
        """How many answers are there already.

        Raises:
            RecipeError: the output is there, or was begun with something else.
        """
        if self.output.exists():
            raise RecipeError("is there already", fix="name another --output", file=str(self.output))
        if not (self.note.is_file() and self.part.is_file()):
            self.part.unlink(missing_ok=True)  # first: answers that nothing is known of are none of these
            write_json(self.note, self.facts)
            self.part.write_bytes(b"")
            return 0
        wrong = self._other()
        if wrong:
            what = f"was begun with another {', '.join(wrong)}"
            fix = f"name another --output, or remove {self.part.name} and {self.note.name}"
            raise RecipeError(what, fix=fix, file=str(self.part))
        lines = self.part.read_bytes().splitlines(keepends=True)
        whole = sum(line.endswith(b"\n") for line in lines)
        with self.part.open("r+b") as file:
            file.truncate(sum(map(len, lines[:whole])))
        return whole

    def _other(self) -> list[str]:
        try:
            before = json.loads(self.note.read_text("utf-8"))
            return [key for key in self.facts if before.get(key) != self.facts[key]]
        except (ValueError, AttributeError):
            return ["question"]  # the note is none of ours

    def end(self) -> None:
        """The output is whole."""
        self.part.replace(self.output)
        self.note.unlink()


def answer(llm: LLM, work: Work, sampling: Sampling, raw: bool, console: Console) -> int:
    """Answers every row; gives how many there are.

    Raises:
        DataError: rows cannot be asked; all are looked at before anything is written.
        RecipeError: the output is there, or was begun with something else.
    """
    chat = bool(llm.tokenizer.chat_template) and not raw
    total = checked(work.rows, chat, llm.renderer, sampling, llm.longest)
    if not total:
        raise DataError("holds no rows", fix="give a file with rows", file=str(work.rows))
    done = work.begin()
    rows = Asked(islice(questions(work.rows, chat), done, None), llm.renderer)
    console.start("answers", total, done)
    told = Told(console, total, done)
    with work.part.open("ab") as file:
        for completion in rows.answered(llm.writer, sampling, done):
            file.write(_answered(rows.waiting.popleft(), completion).encode())
            file.flush()
            told.one(completion)
    console.end()
    work.end()
    return total


class Asked:
    """Rows on their way through a generator; those whose answers are not yet there wait in order."""

    def __init__(self, rows: Iterable[Question], renderer: Renderer) -> None:
        self.rows, self.renderer = rows, renderer
        self.waiting = deque[Raw]()

    def answered(self, writer: Writer, sampling: Sampling, first: int) -> Iterator[Completion]:
        """The answers in order; row i draws by a seed of its own, so that a file may be answered in two goes.

        Raises:
            DataError: a row cannot be asked; it is named by its place.
        """
        with self._placed():
            yield from writer.each(seeded(self._prompts(), sampling, first))

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """An error is one of the row that was read last."""
        try:
            yield
        except DataError as cause:
            if not self.waiting:  # it was the file's own, with its place
                raise
            raise DataError(problems=[placed(cause, self.waiting[-1])]) from cause

    def _prompts(self) -> Iterator[Prompt]:
        for raw, asked in self.rows:
            self.waiting.append(raw)
            said = asked if isinstance(asked, str) else tuple(asked)
            yield Prompt(tuple(prompt_ids(self.renderer, asked)), said)


class Told:
    """Progress over answers, with how many tokens a second are made."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done, self.tokens = console, total, done, 0
        self.began = time.monotonic()

    def one(self, completion: Completion) -> None:
        """One more answer."""
        self.done += 1
        self.tokens += sum(len(output.token_ids) for output in completion.outputs)
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        self.console.step("answers", self.done, self.total, f"{rate:.0f} tokens/s")


def _answered(raw: Raw, made: Completion) -> str:
    """A row with its answer, as a line; a completion that the row has already becomes its `reference`."""
    told: dict[str, Any] = {"completion": made.text, "finish_reason": made.finish_reason}
    told |= {"prompt_tokens": made.prompt_tokens, "completion_tokens": len(made.token_ids)}
    if len(made.outputs) > 1:
        told["completions"] = [output.text for output in made.outputs]
    if made.why:
        told["error"] = made.why
    own = {"reference": raw.values["completion"]} if "completion" in raw.values else {}
    return _line({**raw.values, **own, **told})


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    half = any("\ud800" <= letter <= "\udfff" for letter in text)  # of a surrogate pair: UTF-8 has none
    return (json.dumps(row) if half else text) + "\n"


def facts(model: str, version: Any, path: Path, sampling: Sampling, more: Mapping[str, Any]) -> dict[str, Any]:
    """What answers depend on."""
    said = json.dumps(version, sort_keys=True, default=str).encode()
    base = {"model": model, "weights": hashlib.sha256(said).hexdigest(), "rows": sha256(path)}
    told: dict[str, Any] = json.loads(json.dumps({**base, **more, **asdict(sampling)}, default=str))
    return told
