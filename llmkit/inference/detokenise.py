"""From tokens to text as they come, in linear time: what was given, put together, is the decoding of them all.

How tokens become text is read from the tokenizer's own description. Byte-level ones join the bytes of all tokens and
read UTF-8; those after SentencePiece replace a mark by a space, and read runs of byte tokens as UTF-8, where a run that
is not valid as a whole becomes one mark of a broken letter for each byte: so a run is given when it has ended. For any
other tokenizer the last few tokens are decoded again.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

BROKEN = "\ufffd"
WINDOW = 32
"""Tokens that may wait for the rest of their letter where nothing is known of the tokenizer."""


class Detokeniser(Protocol):
    """The text of tokens that come one by one."""

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        ...

    def rest(self) -> str:
        """What was held back, at the end."""
        ...


def detokeniser(tokenizer: Any, special: bool | Collection[str] = False) -> Callable[[], Detokeniser]:
    """Makes detokenisers for one tokenizer; of its special tokens those have text that `special` names, or all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda: Window(tokenizer, bool(special))
    steps, added = _steps(backend), backend.get_added_tokens_decoder()
    shown = special if isinstance(special, Collection) else [token.content for token in added.values() if special]
    hidden = {id for id, token in added.items() if token.special and token.content not in shown}

    def piece(token: int) -> str | None:
        return None if token in hidden else backend.id_to_token(token)

    if _bytewise(steps):
        known: dict[int, bytes] = {}
        return lambda: ByteLevel(piece, known)
    marked = _marked(steps)
    return (lambda: Window(tokenizer, bool(special))) if marked is None else (lambda: Pieces(piece, marked))


def speller(tokenizer: Any) -> Callable[[int], bytes]:
    """Gives the bytes of one token, which may be a part of a letter; of a special one, those of its text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = _steps(backend) if backend is not None else []
    marked, bytewise = _marked(steps) if steps else None, _bytewise(steps)

    def spelt(token: int) -> bytes:
        piece: str | None = backend.id_to_token(token) if backend is not None else None
        if piece is not None and bytewise:
            return _raw(piece)
        if piece is None or marked is None:
            return str(tokenizer.decode([token])).encode("utf-8", "replace")
        if marked.bytes and (byte := _byte(piece)) is not None:
            return bytes([byte])
        return marked.text(piece).encode("utf-8", "replace")

    return spelt


def _steps(backend: Any) -> list[dict[str, Any]]:
    """What the tokenizer's decoder does, in order."""
    said: dict[str, Any] = {"type": "none"} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = said["decoders"] if said["type"] == "Sequence" else [said]
    return steps


def _bytewise(steps: list[dict[str, Any]]) -> bool:
    """Whether tokens are bytes."""
    return [step["type"] for step in steps] == ["ByteLevel"]


class ByteLevel:
    """Tokens that are bytes."""

    def __init__(self, piece: Callable[[int], str | None], known: dict[int, bytes]) -> None:
        self.piece, self.known = piece, known
        self.reader = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        raw = self.known.get(token)
        if raw is None:
            raw = self.known[token] = _raw(self.piece(token) or "")
        return self.reader.decode(raw)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self.reader.decode(b"", True)


def _letters() -> dict[str, int]:
    """The letter that stands for each byte: itself if it can be seen, else one past the first 256 (GPT-2)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(others)}


LETTERS = _letters()


def _raw(piece: str) -> bytes:
    """The bytes of a token; one with any other letter was added, and is text as it stands."""
    if all(letter in LETTERS for letter in piece):
        return bytes(LETTERS[letter] for letter in piece)
    return piece.encode()


@dataclass(frozen=True)
class Marked:
    """How pieces become text."""

    replaced: tuple[tuple[str, str], ...] = ()
    bytes: bool = False
    """Whether `<0x0A>` is a byte."""
    stripped: str = ""
    """Taken from the beginning of the text, up to `most` times."""
    most: int = 0
    bare: bool = False
    """Whether the first piece loses its marks."""

    def text(self, piece: str) -> str:
        """Of one that is no byte."""
        for old, new in self.replaced:
            piece = piece.replace(old, new)
        return piece


def _marked(steps: list[dict[str, Any]]) -> Marked | None:
    """The description of a decoder after SentencePiece, if it is one."""
    if [step["type"] for step in steps] == ["Metaspace"]:
        own = steps[0]
        return Marked(replaced=((own["replacement"], " "),), bare=own.get("prepend_scheme") != "never")
    order = [step["type"] for step in steps]
    wanted = ["Replace"] * order.count("Replace") + [one for one in ("ByteFallback", "Fuse", "Strip") if one in order]
    if order != wanted or "Fuse" not in order:
        return None
    replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    strip: dict[str, Any] = steps[-1] if order[-1] == "Strip" else {"content": "", "start": 0, "stop": 0}
    if strip["stop"] or not all(old for old, _ in replaced):
        return None
    return Marked(tuple(replaced), "ByteFallback" in order, strip["content"], strip["start"])


class Pieces:
    """Tokens that are pieces of text, or single bytes."""

    def __init__(self, piece: Callable[[int], str | None], how: Marked) -> None:
        self.piece, self.how = piece, how
        self.run = bytearray()
        self.first, self.left = True, how.most

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        piece = self.piece(token)
        if piece is None:
            return ""
        if self.first and self.how.bare:
            piece = piece.replace(self.how.replaced[0][0], "")
        self.first = False
        piece = self.how.text(piece)
        if self.how.bytes and (byte := _byte(piece)) is not None:
            self.run.append(byte)
            return ""
        return self._stripped(self._read() + piece)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._stripped(self._read())

    def _read(self) -> str:
        run, self.run = self.run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return BROKEN * len(run)

    def _stripped(self, text: str) -> str:
        while text and self.left:
            self.left = self.left - 1 if text[0] == self.how.stripped else 0
            text = text[1:] if text[0] == self.how.stripped else text
        return text


def _byte(piece: str) -> int | None:
    if len(piece) != 6 or not piece.startswith("<0x") or piece[-1] != ">":
        return None
    try:
        return int(piece[3:5], 16)
    except ValueError:
        return None


class Window:
    """Any tokens: the last ones are decoded again with each that comes."""

    def __init__(self, tokenizer: Any, special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.ids: list[int] = []
        self.given = 0
        """How many of `ids` have given their text."""

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self.ids.append(token)
        if self._text(self.ids).endswith(BROKEN) and len(self.ids) - self.given < WINDOW:
            return ""
        return self.rest()

    def rest(self) -> str:
        """What was held back, at the end."""
        before, now = self._text(self.ids[: self.given]), self._text(self.ids)
        if len(now) <= len(before):
            return ""
        self.ids = self.ids[self.given :]
        self.given = len(self.ids)
        return now[len(before) :]

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not self.special)
        return text
