"""What is found in an answer, piece by piece, and the same put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model says to itself."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A tool call: the `index`-th of the answer, of a tool that was offered."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of its arguments; all of it, put together, is one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnds:
    """The call is complete; `whole` is false where its arguments were told as they came and then broke off."""

    index: int
    whole: bool = True


Said = Text | Reasoning | CallBegins | CallArguments | CallEnds


@dataclass(frozen=True)
class Call:
    """One tool call."""

    name: str
    arguments: str
    """JSON text of an object."""
    whole: bool = True


@dataclass(frozen=True)
class Message:
    """A whole answer."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]


def merged(events: Iterable[Said]) -> list[Said]:
    """The same with neighbours of one kind joined: two that differ only in how they were cut are equal."""
    joined: list[tuple[Said, list[str]]] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, CallBegins | CallEnds):
            joined.append((event, []))
        elif last is not None and type(last[0]) is type(event) and _index(last[0]) == _index(event):
            last[1].append(event.text)
        else:
            joined.append((event, [event.text]))
    return [_with(event, "".join(parts)) for event, parts in joined]


def message(events: Iterable[Said]) -> Message:
    """All of them as one message."""
    text, reasoning, calls = [], [], list[tuple[str, list[str], bool]]()
    for event in events:
        match event:
            case Text():
                text.append(event.text)
            case Reasoning():
                reasoning.append(event.text)
            case CallBegins():
                calls.append((event.name, [], False))
            case CallArguments():
                calls[event.index][1].append(event.text)
            case CallEnds():
                calls[event.index] = (*calls[event.index][:2], event.whole)
    made = tuple(Call(name, "".join(parts), whole) for name, parts, whole in calls)
    return Message("".join(text), "".join(reasoning), made)


def _index(event: Said) -> int:
    return event.index if isinstance(event, CallArguments) else -1


def _with(event: Said, text: str) -> Said:
    match event:
        case CallArguments():
            return CallArguments(event.index, text)
        case Text() | Reasoning():
            return type(event)(text)
    return event
