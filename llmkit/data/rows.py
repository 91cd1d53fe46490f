"""Reading rows: every object with the place that it came from, and what a row must hold to be trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError

MOST_LINE = 1 << 26
MOST_TEXT = 2_000_000
"""Characters of one row: a tokenizer's time on a longer one has no bound that helps anybody."""
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"PAR1": "parquet", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}


@dataclass(frozen=True)
class Raw:
    """One object as read."""

    values: Mapping[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class Row:
    """One row that can be rendered: messages, or a prompt (may be empty) with the text to learn."""

    id: int
    cluster: str
    messages: tuple[Mapping[str, Any], ...] = ()
    learn_from: int = 0
    """Index of the first message that may be trained on."""
    prompt: str = ""
    completion: str = ""
    tools: tuple[Any, ...] = field(default=())

    @property
    def question(self) -> tuple[Mapping[str, Any], ...] | str:
        """What a model is asked: all before the last answer."""
        return self.messages[:-1] if self.messages else self.prompt

    @property
    def answer(self) -> str:
        """The last answer."""
        return str(self.messages[-1].get("content") or "") if self.messages else self.completion


class Unusable(Exception):
    """Why a row cannot be used, as a short reason."""


def read_jsonl(path: Path) -> Iterator[Raw | DataError]:
    """The objects of a file, or the error that a line is.

    Raises:
        DataError: the file cannot be read at all.
    """
    at = 0
    with _opened(path) as file:
        number = 0
        while raw := file.readline(MOST_LINE + 1):
            number += 1
            if len(raw) > MOST_LINE:
                raise DataError(
                    f"is longer than {MOST_LINE >> 20} MiB", fix="split the row", file=str(path), line=number
                )
            body = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if body.strip():
                yield _parsed(body, path, number, at, torn=not raw.endswith(b"\n"))
            at += len(raw)


def _opened(path: Path) -> Any:
    try:
        file = path.open("rb")
    except OSError as cause:
        raise DataError(
            f"cannot be read ({cause.strerror})", fix="mend data.train or data.valid", file=str(path)
        ) from cause
    start = file.read(4)
    file.seek(0)
    kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), "")
    if kind:
        file.close()
        fix = "use kind: parquet" if kind == "parquet" else f"unpack it: {kind} is not read in this version"
        raise DataError(f"is {kind}, not jsonl", fix=fix, file=str(path), line=1)
    return file


def _parsed(raw: bytes, path: Path, line: int, at: int, torn: bool) -> Raw | DataError:
    place: dict[str, Any] = {"file": str(path), "line": line}
    try:
        said = json.loads(raw.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as cause:
        return DataError(f"byte {at + cause.start} is not UTF-8", fix="save the file as UTF-8", **place)
    except RecursionError:
        return DataError("nests too deep", fix="flatten the row", **place)
    except json.JSONDecodeError as cause:
        return _broken(raw, cause, at, torn, place)
    except ValueError as cause:
        return DataError(f"cannot be read ({str(cause).split(';')[0]})", fix="mend the row", **place)
    if not isinstance(said, dict):
        return DataError(f"holds a {type(said).__name__}, not an object", fix="write one object a line", **place)
    return Raw(said, str(path), line)


def _broken(raw: bytes, cause: json.JSONDecodeError, at: int, torn: bool, place: dict[str, Any]) -> DataError:
    text = raw.strip()
    if cause.msg == "Extra data" and text[: cause.pos].strip().endswith(b"}"):
        return DataError("holds two objects on one line", fix="write one object a line", **place)
    if text in (b"{", b"[") or (text.startswith(b"[") and place["line"] == 1):
        return DataError("is pretty-printed JSON, not jsonl", fix="write one object a line", **place)
    what = "is torn off" if torn else f"is not JSON ({cause.msg})"
    return DataError(
        f"{what} at byte {at + cause.pos}", fix="mend the line, or set data.on_bad_row=quarantine", **place
    )


def read_parquet(path: Path) -> Iterator[Raw | DataError]:
    """The rows of a parquet file.

    Raises:
        DataError: it is not parquet, is cut short, or would unpack to far more than it is.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as missing:
        raise DataError(
            f"parquet needs pyarrow ({missing})", fix="pip install 'llmkit[parquet]'", file=str(path)
        ) from missing
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as cause:
        why = str(cause).splitlines()[0][:120]
        raise DataError(f"is no whole parquet file ({why})", fix="write it again", file=str(path)) from cause
    unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if unpacked > 1000 * max(path.stat().st_size, 1 << 16):
        raise DataError(f"unpacks to {unpacked / 2**30:.1f} GiB", fix="check where it comes from", file=str(path))
    line = 0
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            line += 1
            yield Raw(values, str(path), line)


def mapped(raw: Raw, columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under our names for its columns.

    Raises:
        DataError: a mapped column is not there.
    """
    if not columns:
        return raw.values
    missing = [theirs for theirs in columns.values() if theirs not in raw.values]
    if missing:
        known = ", ".join(map(str, list(raw.values)[:12]))
        raise DataError(
            f"has no column {missing[0]}", fix=f"map to one of {known}", file=raw.file, line=raw.line, key="columns"
        )
    taken = set(columns.values())
    rest = {name: value for name, value in raw.values.items() if name not in taken and name not in columns}
    return rest | {ours: raw.values[theirs] for ours, theirs in columns.items()}


def shaped(values: Mapping[str, Any], id: int) -> Row:
    """A row in one of the known formats.

    Raises:
        Unusable: with the reason.
    """
    cluster = str(values.get("cluster", id))
    tools = tuple(values.get("tools") or ())
    if "messages" in values:
        return Row(id, cluster, _messages(values["messages"]), 0, tools=tools)
    prompt, completion = values.get("prompt"), values.get("completion")
    if completion is not None and isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages([*prompt, *completion])
        return Row(id, cluster, messages, len(prompt), tools=tools)
    if completion is not None:
        return Row(id, cluster, prompt=_text(prompt, "prompt"), completion=_text(completion, "completion"))
    if "text" in values:
        return Row(id, cluster, completion=_text(values["text"], "text"))
    raise Unusable("no messages, prompt and completion, or text")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is {'null' if value is None else 'not text'}")
    if not value.strip():
        raise Unusable(f"{name} is blank")
    if len(value) > MOST_TEXT:
        raise Unusable(f"{name} is longer than {MOST_TEXT} characters")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise Unusable(f"{name} holds half a surrogate pair")
    return value


def _messages(given: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(given, list) or not given or not all(isinstance(m, dict) for m in given):
        raise Unusable("messages is not a list of messages")
    roles = [m.get("role") for m in given]
    turns = [role for role in roles if role != "system"]
    if "assistant" not in turns:
        raise Unusable("no assistant turn")
    if "system" in roles[1:] or turns[0] != "user" or any(r not in ("user", "assistant", "tool") for r in turns):
        raise Unusable("roles in the wrong order")
    if any(a == b and a in ("user", "assistant") for a, b in itertools.pairwise(turns)):
        raise Unusable("roles in the wrong order")
    for message in given:
        if not (message.get("role") == "assistant" and message.get("tool_calls")):
            _text(message.get("content"), f"content of {message.get('role')}")
    last = max(i for i, role in enumerate(roles) if role == "assistant")
    return tuple(given[: last + 1])  # what follows the last answer can teach nothing
