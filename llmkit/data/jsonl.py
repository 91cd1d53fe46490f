"""Lines of JSON: one object each, read strictly and with a bound on every line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmkit.data.rows import KEPT, At, BadRow, Raw
from llmkit.data.sources import opened

MOST_LINE = 1 << 24
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class _Line:
    """One line and where it stands: the place of its first byte in the file, and that of the next line's."""

    text: bytes
    file: str
    number: int
    at: int
    end: int

    @property
    def behind(self) -> At:
        """Where reading goes on behind it."""
        return self.end, self.number

    def bad(self, what: str, fix: str) -> BadRow:
        return BadRow(what, fix, self.file, self.number, self.text, self.behind)


def read_jsonl(path: str | Path, after: At = ()) -> Iterator[Raw | BadRow]:
    """The objects of a file, or the error that a line is; blank lines are passed over.

    Raises:
        DataError: the file cannot be read at all.
    """
    at, number = after or (0, 0)
    with opened(path, "jsonl") as file:
        file.seek(at)
        while text := file.readline(MOST_LINE + 1):
            number += 1
            if len(text) > MOST_LINE:
                end = at + len(text) + _skip(file)
                line = _Line(text[:KEPT], str(path), number, at, end)
                yield line.bad(f"is longer than {MOST_LINE >> 20} MiB", "split the row")
                at = end
                continue
            end = at + len(text)
            body = text.removeprefix(BOM) if number == 1 else text
            if body.strip():
                yield _parsed(_Line(body, str(path), number, end - len(body), end))
            at = end


def _skip(file: BinaryIO) -> int:
    """Goes on to the next line without holding what it skips; gives its bytes."""
    skipped = 0
    while text := file.readline(1 << 20):
        skipped += len(text)
        if text.endswith(b"\n"):
            break
    return skipped


def _parsed(line: _Line) -> Raw | BadRow:
    try:
        said = json.loads(line.text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as cause:
        if cause.reason == "unexpected end of data" and not line.text.endswith(b"\n"):
            return _torn(line, cause.start)
        return line.bad(f"byte {line.at + cause.start} is not UTF-8", "save the file as UTF-8")
    except RecursionError:
        return line.bad("nests too deep", "flatten the row")
    except json.JSONDecodeError as cause:
        return _broken(line, cause)
    except ValueError as cause:  # a number of more digits than Python reads
        return line.bad(f"cannot be read ({str(cause).split(';')[0]})", "mend the row")
    if not isinstance(said, dict):
        words = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
        return line.bad(f"holds {words.get(type(said), 'a number')}, not an object", "write one object a line")
    return Raw(said, line.file, line.number, line.text, line.behind)


def _broken(line: _Line, cause: json.JSONDecodeError) -> BadRow:
    before, after = cause.doc[: cause.pos], cause.doc[cause.pos :].strip()
    byte = len(before.encode("utf-8", "surrogatepass"))
    cut = cause.msg.startswith(("Unterminated", "Invalid \\u")) or any(
        word.startswith(after) for word in ("true", "false", "null")
    )
    if cut and not line.text.endswith(b"\n"):
        return _torn(line, byte)
    if form := _form(line, cause.msg, after):
        return line.bad(form, "write one object a line")
    return line.bad(
        f"is not JSON ({cause.msg}) at byte {line.at + byte}", "mend the line, or set data.on_bad_row=quarantine"
    )


def _form(line: _Line, why: str, after: str) -> str:
    """What the line is instead of one object, as far as its form tells; `after` is what stands behind the fault."""
    text = line.text.strip()
    if why == "Extra data" and text.startswith(b"{"):
        return {"{": "holds two objects on one line", ",": "ends in a comma, as an item of a list does"}.get(
            after[0], ""
        )
    if text in (b"{", b"[") or (line.number == 1 and (text.startswith(b"[") or (text.startswith(b"{") and not after))):
        return "is pretty-printed JSON, not jsonl"
    if text.startswith((b"{'", b'{"')) and not after:
        return "goes on in the next line"
    return "is a Python dict, not JSON" if text.startswith(b"{'") else ""


def _torn(line: _Line, byte: int) -> BadRow:
    return line.bad(f"is torn off at byte {line.at + byte}", "mend the line, or set data.on_bad_row=quarantine")
