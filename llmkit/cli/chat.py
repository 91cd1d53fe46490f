"""`llmkit chat`: a conversation in the terminal; answers appear as they are made."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from llmkit.cli.text import KNOB, Asking
from llmkit.core.errors import DataError
from llmkit.core.memory import out_of_memory_named
from llmkit.inference.request import RequestError
from llmkit.inference.sampling import Sampling

HELP = """/reset           forget the conversation
/system [TEXT]   what the model is told before it; none without TEXT
/adapter [NAME]  the adapter that answers; the model itself without NAME
/help            this list
An empty line ends the chat, Ctrl-C an answer, or the chat where none is made.
"""


@dataclass
class Talk:
    """A conversation so far."""

    llm: Any
    sampling: Sampling
    system: str = ""
    adapter: str = ""
    said: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """What the model reads."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.said

    def command(self, line: str) -> str:
        """Does what a line beginning with `/` says; gives what to tell."""
        word, _, rest = line.partition(" ")
        if word == "/reset":
            self.said.clear()
            return ""
        if word == "/system":
            self.system = rest.strip()
            return ""
        if word == "/adapter":
            return self._take(rest.strip())
        return HELP if word == "/help" else f"{word} is no command; /help lists them\n"

    def _take(self, name: str) -> str:
        known = self.llm.adapters
        if name and name not in known:
            there = ", ".join(known) or "none is loaded"
            return f"no adapter is named {name} ({there})\n"
        self.adapter = name
        return ""

    def answer(self, line: str) -> None:
        """Asks, and writes the answer piece by piece; Ctrl-C ends it, and what was said stays said. What cannot be
        asked, or fails, is told, and is as if it had not been."""
        self.said.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            with _stoppable() as stopped:
                for piece in self.llm.stream(self.messages(), self.sampling, adapter=self.adapter):
                    pieces.append(piece.text)
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
                    if piece.why:
                        raise RequestError(f"the answer failed: {piece.why}")
                    if stopped:
                        break
        except DataError as cause:
            self.said.pop()
            problem, begun = cause.problems[0], "\n" * any(pieces)
            sys.stdout.write(f"{begun}{problem.key or 'this'}: {problem.what}; /reset forgets what was said\n")
            return
        sys.stdout.write("\n")
        self.said.append({"role": "assistant", "content": "".join(pieces)})


def chat(asking: Asking, system: str = "") -> None:
    """A conversation, until an empty line or the end of the input."""
    if sys.stdin.isatty():
        _edited()
    sampling = asking.sampling()
    talk = Talk(asking.open(), sampling, system)
    while (line := _ask()).strip():
        if line.startswith("/"):
            sys.stdout.write(talk.command(line.strip()))
        else:
            with out_of_memory_named(talk.llm.device, KNOB):
                talk.answer(line)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """While an answer is made Ctrl-C is noted in a list, and does not end a step in its middle."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _edited() -> None:
    """Lines can be edited, and said again by the arrow keys."""
    with suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401 - `input` uses it once it is there


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            sys.stdout.write("\n")  # the shell goes on in a line of its own
        return ""
