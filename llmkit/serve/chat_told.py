"""`/v1/chat/completions`: what is answered, streamed and whole, by one reading of what the model said."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from llmkit.inference.pieces import Piece
from llmkit.inference.request import Token
from llmkit.inference.said.events import CallArguments, CallBegins, CallEnds, Reasoning, Said, Text, merged
from llmkit.serve.chat import Chat
from llmkit.serve.generated import Generation
from llmkit.serve.service import Service


class Choice:
    """One answer: what the model says, taken apart as it comes."""

    def __init__(self, service: Service, asked: Chat) -> None:
        self.parser = asked.chosen.parser(service.format, asked.thinking)
        self.calls: list[dict[str, Any]] = []
        self.called = False
        """Whether one of them is whole: what broke off is told, and asks for nothing."""
        self.finish: str | None = None
        self.text, self.reasoning = "", ""
        self.tokens: list[Token] = []
        self.thought = 0
        """Tokens of its reasoning."""

    def take(self, piece: Piece) -> list[Said]:
        """What a piece says; an answer that called tools ends by that."""
        said: list[Said] = []
        for text in (*piece.texts[:-1], "".join(piece.texts[-1:]) + piece.rest):  # by each: its thoughts are counted
            more = self.parser.feed(text)
            self.thought += bool(piece.tokens) and any(isinstance(one, Reasoning) for one in more)
            said += more
        finish = piece.finish_reason
        if finish is not None:
            said += self.parser.finish()
        said = merged(said)
        self._keep(said)
        self.finish = "tool_calls" if finish == "stop" and self.called else finish
        return said

    def _keep(self, said: Iterable[Said]) -> None:
        for one in said:
            match one:
                case Text():
                    self.text += one.text
                case Reasoning():
                    self.reasoning += one.text
                case CallBegins():
                    function = {"name": one.name, "arguments": ""}
                    self.calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
                case CallArguments():
                    self.calls[one.index]["function"]["arguments"] += one.text
                case CallEnds():
                    self.called |= one.whole

    def deltas(self, said: Iterable[Said]) -> list[dict[str, Any]]:
        """The same as what a stream tells."""
        made: list[dict[str, Any]] = []
        for one in said:
            match one:
                case Text():
                    made.append({"content": one.text})
                case Reasoning():
                    made.append({"reasoning_content": one.text})
                case CallBegins():
                    call = self.calls[one.index]
                    function = {"name": one.name, "arguments": ""}
                    made.append({"tool_calls": [{**call, "index": one.index, "function": function}]})
                case CallArguments():
                    made.append({"tool_calls": [{"index": one.index, "function": {"arguments": one.text}}]})
        return made

    def message(self) -> dict[str, Any]:
        """The whole of it."""
        made: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        made["refusal"] = None
        if self.reasoning:
            made["reasoning_content"] = self.reasoning
        return made | {"tool_calls": self.calls} if self.calls else made


def generation(service: Service, asked: Chat) -> Generation:
    """The answers to a conversation; calls and thoughts may be written in special tokens."""
    return Generation(service, [asked.request], asked.account, service.chat_texts[bool(asked.chosen.tools)])


class ChatWriter:
    """Answers in the shapes of chat."""

    def __init__(self, service: Service, asked: Chat) -> None:
        self.service, self.asked = service, asked
        self.spelling = service.spelling
        self.made = generation(service, asked)
        self.choices = [Choice(service, asked) for _ in range(asked.request.sampling.n)]

    async def whole(self) -> dict[str, Any]:
        """The answers when all of them are there."""
        async with aclosing(self.made.pieces(patient=True)) as pieces:
            async for index, _, piece in pieces:
                self.choices[index].take(piece)
                self.choices[index].tokens += piece.tokens
        told = [
            {
                "index": index,
                "message": choice.message(),
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self._object("chat.completion", told) | {"usage": self._usage()}

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answers as they grow."""
        begun: set[int] = set()
        async with aclosing(self.made.pieces()) as pieces:
            async for index, _, piece in pieces:
                choice = self.choices[index]
                deltas = choice.deltas(choice.take(piece))
                if index not in begun:
                    begun.add(index)
                    yield self._part(index, {"role": "assistant", "content": ""})
                logprobs = self._logprobs(piece.tokens) if piece.tokens else None
                if logprobs and not deltas:
                    deltas = [{"content": ""}]  # what is held back of the text is told in full of its tokens
                for delta in deltas:
                    yield self._part(index, delta, logprobs)
                    logprobs = None
                if choice.finish is not None:
                    yield self._part(index, {}, None, choice.finish)
        if self.asked.usage:
            yield self._object("chat.completion.chunk", []) | {"usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        usage = self.made.usage()
        usage.reasoning = sum(choice.thought for choice in self.choices)
        return usage.told()

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        return {"content": self.spelling.chat(tokens), "refusal": None} if self.asked.logprobs else None

    def _part(
        self, index: int, delta: dict[str, Any], told: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
        made = self._object("chat.completion.chunk", [choice])
        return made | {"usage": None} if self.asked.usage else made

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.made.object(f"chatcmpl-{self.asked.request.id}", kind, choices)
