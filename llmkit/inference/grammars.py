"""Grammars that are ready for use: tried in a process of their own, then compiled here and kept."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

from llmkit.core.readable import readable
from llmkit.inference.grammar import Grammar
from llmkit.inference.grammar_worker import MEMORY, SECONDS
from llmkit.inference.matching import Match, begun, described, refused, vocabulary
from llmkit.inference.request import Busy, RequestError

KEPT = 256
"""Grammars, refused ones among them."""
BYTES = 16 << 20
"""Of the text of all that are kept."""
PATIENCE = 60.0
"""Seconds on the clock after which a process that says nothing is given up, however busy the machine is."""


class Grammars:
    """For one tokenizer. Threads may ask at once: one that asks for a grammar that is kept waits for no other."""

    def __init__(self, tokenizer: Any, words: int, ends: Sequence[int]) -> None:
        """
        Raises:
            RequestError: nothing can be enforced with this tokenizer.
        """
        if not ends:
            raise RequestError("the model has no token that ends a text", fix="leave grammar out", key="grammar")
        description = described(tokenizer)
        self.tokens = vocabulary(description, words, ends)
        self.trial = Trial(json.dumps({"tokenizer": description, "words": words, "ends": list(ends)}))
        self.words, self.kept, self.lock, self.bytes = words, OrderedDict[bytes, tuple[Match | str, int]](), Lock(), 0

    def matcher(self, grammar: Grammar) -> Match:
        """A matcher before its first token.

        Raises:
            RequestError: the grammar cannot be enforced in bounded time and memory.
        """
        source = grammar.source()
        key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()
        found = self._found(key)
        if found is None:
            found = self._tried(source)
            self._keep(key, found, len(source))
        if isinstance(found, str):
            raise refused(found)
        return found.fork()

    def _tried(self, source: str) -> Match | str:
        wrong = self.trial.ask(source)
        if wrong:
            return wrong.removeprefix("cannot be enforced: ")
        made = begun(self.tokens, source)
        made.mask(self.words)  # the longest of all, outside of any step
        return made

    def _found(self, key: bytes) -> Match | str | None:
        with self.lock:
            if key not in self.kept:
                return None
            self.kept.move_to_end(key)
            return self.kept[key][0]

    def _keep(self, key: bytes, what: Match | str, size: int) -> None:
        with self.lock:
            self.bytes += size - self.kept.pop(key, (what, 0))[1]
            self.kept[key] = what, size
            while len(self.kept) > KEPT or (self.bytes > BYTES and len(self.kept) > 1):
                self.bytes -= self.kept.popitem(last=False)[1][1]


class Trial:
    """The process that tries grammars; where one is its end, the next begins another."""

    def __init__(self, opening: str) -> None:
        self.opening, self.lock = opening, Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, source: str) -> str:
        """What is wrong with a grammar; nothing if it can be used."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _begun()
                said = self._exchange(self.process, self.opening)
                if said:
                    raise _unbegun(said)
            return self._exchange(self.process, json.dumps(source))

    def close(self) -> None:
        """Ends the process."""
        with self.lock:
            if self.process is not None:
                _ended(self.process)
                self.process = None

    def _exchange(self, process: subprocess.Popen[bytes], line: str) -> str:
        try:
            said = _said(process, line.encode() + b"\n")
        except BrokenPipeError:
            said = b""
        if said.endswith(b"\n"):
            return str(json.loads(said))
        code, self.process = _ended(process), None
        if code == -signal.SIGXCPU:
            return f"it takes more than {SECONDS} s"
        if code == -signal.SIGKILL:  # no fault of the grammar: it is not kept
            raise Busy(f"nothing was heard of it in {PATIENCE:g} s", fix="ask again", key="grammar")
        return f"it takes more than {MEMORY >> 20} MiB"


def _begun() -> subprocess.Popen[bytes]:
    """
    Raises:
        Busy: the machine has no room for a process now.
    """
    command = [sys.executable, "-m", "llmkit.inference.grammar_worker"]
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    except OSError as cause:
        raise _unbegun(cause.strerror or str(cause)) from cause


def _unbegun(why: str) -> Busy:
    return Busy(f"no process to try it could be begun: {why}", fix="ask again", key="grammar")


def _said(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The line that a process answers; less if it ends or says nothing."""
    if process.stdin is None or process.stdout is None:
        raise BrokenPipeError
    sent = memoryview(line)
    while sent:
        sent = sent[process.stdin.write(sent) or 0 :]
    until, said = time.monotonic() + PATIENCE, b""
    while not said.endswith(b"\n") and readable(process.stdout, until - time.monotonic()):
        part = process.stdout.read(1 << 16)
        if not part:
            break
        said += part
    return said


def _ended(process: subprocess.Popen[bytes]) -> int:
    """How it ended, or is ended now."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        return process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
