"""The checks of one row each; a new one is one function and one entry of `CHECKS`."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from llmkit.data.findings import Check, Seen

MOJIBAKE = re.compile(
    "[\u00c2\u00c3][\u0080-\u00bf]"  # two bytes of UTF-8 read as two letters of Latin-1
    "|\u00e2[\u0080\u20ac][\u0080-\u00bf\u0152\u0153\u0160\u0161\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u2122]"
    "|[\x80-\x84\x86-\x9f]|\u00f0\u0178|(?:[\u00d0\u00d1][\u0080-\u00bf\u2018-\u203a]){2}|\u00ef\u00bf\u00bd"
)
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ufff9-\ufffb]")
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,6}|#x[0-9a-fA-F]{2,5});")
MIXED = re.compile("[A-Za-z][\u0400-\u04ff][A-Za-z\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z][A-Za-z\u0400-\u04ff]")
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_header_id|begin_of_text|end_of_text|end|user|assistant"
    r"|system|end_of_turn|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN)\|>|\[/?INST\]|<</?SYS>>|</s>"
    r"|<(?:start|end)_of_turn>|(?m:^### (?:Assistant|Human|Response|Instruction):)"
)
PLACEHOLDERS = {"nan", "null", "none", "n/a", "na", "undefined", "todo", "tbd", "[object object]", "<answer>", "xxx"}
LOOP_LENGTH, LOOP_SHARE, PACKED = 96, 0.3, 0.08
"""Tokens of a row from which on a loop is looked for, the share of different ones below which it is, and how small an
answer packs that is one."""


def _shown(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return "" if match is None else ascii(match[0])


def nothing(seen: Seen) -> str:
    """No token has a weight."""
    return "" if any(seen.weights[1:]) else "no token has a weight"


def untrained_end(seen: Seen) -> str:
    """What is trained does not end in a token that ends."""
    last = len(seen.weights) - 1
    while last > 0 and not seen.weights[last]:
        last -= 1
    tail = seen.ids[max(1, last - 2) : last + 1]  # a newline of the template's may stand behind it
    return "" if last <= 0 or any(id in seen.tokens.special for id in tail) else "trained tokens end without it"


def doubled_begin(seen: Seen) -> str:
    """Two tokens that begin a text, one after the other."""
    bos = seen.tokens.bos
    return "two at the start" if bos is not None and list(seen.ids[:2]) == [bos, bos] else ""


def cut(seen: Seen) -> str:
    """An answer that `overflow: truncate` cuts."""
    size, most = len(seen.ids), seen.tokens.max_length
    over = size > most and seen.tokens.overflow == "truncate" and any(seen.weights[most:])
    return f"{size} tokens" if over else ""


def dropped(seen: Seen) -> str:
    """A row that is too long, and left out."""
    return (
        f"{len(seen.ids)} tokens" if len(seen.ids) > seen.tokens.max_length and seen.tokens.overflow == "drop" else ""
    )


def mojibake(seen: Seen) -> str:
    """UTF-8 that was read as another encoding."""
    return "" if seen.plain else _shown(MOJIBAKE, seen.text)


def replaced(seen: Seen) -> str:
    """The letter that stands for bytes that could not be read."""
    return "U+FFFD" if not seen.plain and "\ufffd" in seen.text else ""


def control(seen: Seen) -> str:
    """Control characters but tab, newline, form feed and carriage return."""
    return _shown(CONTROL, seen.text)


def entities(seen: Seen) -> str:
    """HTML's way to write letters."""
    return _shown(ENTITY, seen.text) if "&" in seen.text else ""


def mixed(seen: Seen) -> str:
    """Latin and Cyrillic letters in one word, which look alike."""
    return "" if seen.plain else _shown(MIXED, seen.text)


def special(seen: Seen) -> str:
    """Text of the tokenizer's own special tokens."""
    return "kept as plain text" if seen.rendered.mark else ""


def foreign(seen: Seen) -> str:
    """What chat templates write, inside of what is said."""
    if seen.rendered.mark or not ("<" in seen.text or "[" in seen.text or "### " in seen.text):
        return ""
    return _shown(FOREIGN, seen.text)


def placeholder(seen: Seen) -> str:
    """An answer that says that there is none."""
    answer = seen.answer.strip()
    return ascii(answer) if len(answer) < 16 and answer.lower() in PLACEHOLDERS else ""


def echo(seen: Seen) -> str:
    """An answer that begins with all of the question."""
    asked = seen.asked.strip()
    return ascii(asked[:24]) if len(asked) > 24 and seen.answer.lstrip().startswith(asked) else ""


def glued(seen: Seen) -> str:
    """A text prompt and its completion with no space between two words."""
    row = seen.row
    joined = row.prompt[-1:] + row.completion[:1]
    words = len(joined) == 2 and joined.isascii() and joined.isalnum()
    return ascii(row.prompt[-8:] + "|" + row.completion[:8]) if words else ""


def loop(seen: Seen) -> str:
    """An answer that says the same again and again: few different tokens, and it packs to next to nothing."""
    size = len(seen.ids)
    if size < LOOP_LENGTH or len(set(seen.ids)) > LOOP_SHARE * size:
        return ""
    said = seen.answer.encode("utf-8", "replace")
    packed = len(zlib.compress(said, 1))
    return f"{len(said)} bytes pack to {packed}" if packed < PACKED * len(said) else ""


def thought(seen: Seen) -> str:
    """A thought that is opened and not closed, or the other way round."""
    if "think>" not in seen.text:
        return ""
    row = seen.row
    text = "\n".join(str(m.get("content") or "") for m in row.messages) if row.messages else row.completion
    opened, closed = text.count("<think>"), text.count("</think>")
    begun = not row.messages and closed == opened + 1 and row.prompt.rstrip().endswith("<think>")
    return f"{opened} opened, {closed} closed" if opened != closed and not begun else ""


def repeated(seen: Seen) -> str:
    """The same answer twice in one conversation."""
    if len(seen.row.messages) < 4:
        return ""
    said = [m.get("content") for m in seen.row.messages if m["role"] == "assistant"]
    long = [text for text in said if isinstance(text, str) and len(text) > 40]
    again = next((text for i, text in enumerate(long) if text in long[:i]), "")
    return ascii(again[:24]) if again else ""


def calls(seen: Seen) -> str:
    """Calls of tools that are not there, results of no call, arguments that are no JSON."""
    known = {name for tool in seen.row.tools if (name := _name(tool))}
    waiting = 0
    for message in seen.row.messages:
        made = message.get("tool_calls") or ()
        for call in made:
            name, arguments = _name(call), _function(call).get("arguments")
            if known and name not in known:
                return ascii(f"{name} is no tool of the row")
            if isinstance(arguments, str) and not _is_json(arguments):
                return "arguments that are not JSON"
        if message["role"] == "tool":
            if not waiting:
                return "a result without a call"
            waiting -= 1
        elif waiting and message["role"] == "user":
            return "a call without its result"
        waiting += len(made)
    return ""


def _function(call: Any) -> Mapping[str, Any]:
    inner = call.get("function", call)
    return inner if isinstance(inner, Mapping) else {}


def _name(call: Any) -> str:
    return str(_function(call).get("name") or "")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


CHECKS = (
    Check("nothing to learn", "warn", "no token of it is trained", "raise a weight, or leave it out", nothing),
    Check("untrained end", "warn", "the end of the answer is not trained", "mend the template", untrained_end),
    Check("doubled bos", "warn", "begins twice", "take the first token out of the template", doubled_begin),
    Check("cut answer", "warn", "overflow cuts its answer", "raise data.max_length", cut),
    Check("too long", "info", "is longer than data.max_length and dropped", "raise data.max_length", dropped),
    Check("mojibake", "warn", "text that was read in another encoding than its own", "read it in its own", mojibake),
    Check("replacement character", "warn", "bytes that could not be read", "read it in its encoding", replaced),
    Check("control characters", "warn", "control characters", "take them out", control),
    Check("html entities", "warn", "letters as HTML writes them", "unescape it", entities, 0.1),
    Check("mixed scripts", "warn", "letters of two scripts in one word", "write it in one", mixed),
    Check("special text", "warn", "text of special tokens, kept as plain text", "take it out", special, 0.5),
    Check("template text", "warn", "what another chat template writes", "give it as messages", foreign, 0.5),
    Check("placeholder", "warn", "an answer that is none", "answer it, or leave it out", placeholder, 0.05),
    Check("echo", "info", "the answer begins with the question", "cut the question out", echo),
    Check("glued", "warn", "no space between prompt and completion", "begin completions with a space", glued),
    Check("loop", "warn", "an answer that says the same again and again", "leave it out", loop),
    Check("unclosed thought", "warn", "a thought that is opened or closed alone", "close it", thought),
    Check("repeated answer", "info", "the same answer twice in a conversation", "leave one out", repeated),
    Check("tool calls", "warn", "calls and results that do not fit", "mend the call", calls),
)
REFUSED = (
    ("empty", re.compile(r"blank|null|not text|not a list of messages|^nothing is asked")),
    ("role order", re.compile(r"order|unknown role|a turn is from")),
    ("nothing to learn", re.compile(r"no assistant turn|no answer")),
    ("special text", re.compile(r"special-token")),
    ("surrogates", re.compile(r"surrogate")),
    ("generation prompt", re.compile(r"generation prompt|rewrites|no fixed place|marks \d+ answers")),
    ("weights", re.compile(r"weight|train ")),
)
"""Which name the reason gets why a row cannot be used; the others are `unusable`."""


def refusal(reason: str) -> str:
    """The name of the finding that a row's refusal is."""
    return next((name for name, pattern in REFUSED if pattern.search(reason)), "unusable")
