"""Lines of JSON: one object each, read strictly and with a bound on every line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llmkit.data.lines import TOO_LONG, Line, lines
from llmkit.data.rows import ASIDE, At, BadRow, Raw
from llmkit.data.sources import opened


def read_jsonl(path: str | Path, after: At = ()) -> Iterator[Raw | BadRow]:
    """The objects of a file, or the error that a line is; blank lines are passed over.

    Raises:
        DataError: the file cannot be read at all.
    """
    with opened(path, "jsonl") as file:
        for line in lines(file, str(path), *after):
            if line.long:
                yield line.bad(TOO_LONG, "split the row")
            elif line.text.strip():
                yield _parsed(line)


def _parsed(line: Line) -> Raw | BadRow:
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


def _broken(line: Line, cause: json.JSONDecodeError) -> BadRow:
    before, after = cause.doc[: cause.pos], cause.doc[cause.pos :].strip()
    byte = len(before.encode("utf-8", "surrogatepass"))
    cut = cause.msg.startswith(("Unterminated", "Invalid \\u")) or any(
        word.startswith(after) for word in ("true", "false", "null")
    )
    if cut and not line.text.endswith(b"\n"):
        return _torn(line, byte)
    if form := _form(line, cause.msg, after):
        listed = line.number == 1 and line.text.lstrip().startswith(b"[")
        return line.bad(form, "use kind: json" if listed else "write one object a line")
    return line.bad(f"is not JSON ({cause.msg}) at byte {line.at + byte}", ASIDE)


def _form(line: Line, why: str, after: str) -> str:
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


def _torn(line: Line, byte: int) -> BadRow:
    return line.bad(f"is torn off at byte {line.at + byte}", ASIDE)
