"""`/v1/responses`: what is answered, as items with the events that lead to them."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from llmkit.inference.said.events import CallArguments, CallBegins, CallEnds, Reasoning, Said, Text
from llmkit.serve.chat_told import Choice, generation
from llmkit.serve.responses import Asked
from llmkit.serve.service import Service

Event = dict[str, Any]


class Items:
    """The items of an answer, in the order in which they begin."""

    def __init__(self, number: str) -> None:
        self.number = number
        self.items: list[dict[str, Any]] = []
        self.open = ""
        """The kind of the one that is being made."""
        self.told: list[dict[str, Any]] = []
        """Tokens with their log-probabilities, whose text comes next."""

    def take(self, said: Said) -> Iterator[Event]:
        """The events of one more thing that was said."""
        match said:
            case Text():
                yield from self._begin("message")
                told, self.told = self.told, []
                self.items[-1]["content"][0]["text"] += said.text
                self.items[-1]["content"][0]["logprobs"] += told
                yield self._part("response.output_text.delta", delta=said.text, logprobs=told)
            case Reasoning():
                yield from self._begin("reasoning")
                self.items[-1]["content"][0]["text"] += said.text
                yield self._part("response.reasoning_text.delta", delta=said.text)
            case CallBegins():
                yield from self.end()
                yield from self._begin("function_call", said.name)
            case CallArguments():
                self.items[-1]["arguments"] += said.text
                yield self._event("response.function_call_arguments.delta", delta=said.text)
            case CallEnds():
                yield from self.end("completed" if said.whole else "incomplete")

    def tell(self, tokens: list[dict[str, Any]], said: Sequence[Said]) -> None:
        """`tokens` made what was `said`: those of thoughts and calls are not told, those of text that is held back
        are told with it."""
        held_back = not said and self.open in ("", "message")
        texts = any(isinstance(one, Text) for one in said)
        self.told = [*self.told, *tokens] if held_back or texts else []

    def _begin(self, kind: str, name: str = "") -> Iterator[Event]:
        if self.open == kind:
            return
        yield from self.end()
        self.open, place = kind, len(self.items)
        id = f"{ {'message': 'msg', 'reasoning': 'rs', 'function_call': 'fc'}[kind] }_{self.number}_{place}"
        item: dict[str, Any] = {"id": id, "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": f"call_{self.number}_{place}", "name": name, "arguments": ""}
            self.items.append(item)
            yield self._event("response.output_item.added", item=dict(item))
            return
        item["role" if kind == "message" else "summary"] = "assistant" if kind == "message" else []
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        part = part if kind == "message" else {"type": "reasoning_text", "text": ""}
        self.items.append(item | {"content": [part]})
        yield self._event("response.output_item.added", item=item | {"content": []})
        yield self._part("response.content_part.added", part=copy.deepcopy(part))

    def end(self, status: str = "completed") -> Iterator[Event]:
        """No more of the one that is being made comes."""
        if not self.open:
            return
        kind, self.open = self.open, ""
        item = self.items[-1]
        item["status"] = status
        if kind == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            name = "output_text" if kind == "message" else "reasoning_text"
            more: dict[str, Any] = {"logprobs": part["logprobs"]} if kind == "message" else {}
            yield self._part(f"response.{name}.done", text=part["text"], **more)
            yield self._part("response.content_part.done", part=part)
        yield self._event("response.output_item.done", item=item)

    def _event(self, kind: str, **more: Any) -> Event:
        where: dict[str, Any] = {"output_index": len(self.items) - 1}
        where |= {} if "item" in more else {"item_id": self.items[-1]["id"]}
        return {"type": kind, **where, **more}

    def _part(self, kind: str, **more: Any) -> Event:
        return self._event(kind, content_index=0, **more)


class ResponseWriter:
    """An answer in the shapes of responses."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self.service, self.asked = service, asked
        of = asked.chat
        self.made = generation(service, of)
        self.choice, self.items = Choice(service, of), Items(of.request.id)
        self.spelling = service.spelling

    async def whole(self) -> dict[str, Any]:
        """The answer when all of it is there."""
        last: dict[str, Any] = {}
        async with aclosing(self._events(patient=True)) as parts:
            async for event in parts:
                last = event
        return dict(last["response"])

    async def parts(self) -> AsyncGenerator[Event, None]:
        """The answer as it grows: numbered events."""
        number = 0
        async with aclosing(self._events()) as events:
            async for event in events:
                yield event | {"sequence_number": number}
                number += 1

    async def _events(self, patient: bool = False) -> AsyncGenerator[Event, None]:
        begun = False
        async with aclosing(self.made.pieces(patient)) as pieces:
            async for _, _, piece in pieces:
                if not begun:
                    begun = True
                    yield {"type": "response.created", "response": self._object("in_progress")}
                    yield {"type": "response.in_progress", "response": self._object("in_progress")}
                heard = self.choice.take(piece)
                self.items.tell(self.spelling.chat(piece.tokens) if self.asked.chat.logprobs else [], heard)
                for said in heard:
                    for event in self.items.take(said):
                        yield event
        for event in self.items.end():
            yield event
        state = "incomplete" if self.choice.finish == "length" else "completed"
        yield {"type": f"response.{state}", "response": self._object(state)}

    def _object(self, state: str) -> dict[str, Any]:
        over, usage = state != "in_progress", self.made.usage()
        said, told = self.asked.said, None
        if over:
            told = {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": self.choice.thought, **usage.predicted},
                "total_tokens": usage.prompt + usage.completion,
            }
        return {
            "id": f"resp_{self.asked.chat.request.id}",
            "object": "response",
            "created_at": int(self.asked.chat.account.arrived),
            "status": state,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if state == "incomplete" else None,
            "instructions": said["instructions"],
            "max_output_tokens": said["max_output_tokens"],
            "model": self.asked.chat.account.model,
            "output": [dict(item) for item in self.items.items] if over else [],
            "parallel_tool_calls": said["parallel_tool_calls"] is not False,
            "previous_response_id": None,
            "temperature": self.asked.chat.request.sampling.temperature,
            "text": said["text"] or {"format": {"type": "text"}},
            "tool_choice": said["tool_choice"] or "auto",
            "tools": said["tools"] or [],
            "top_p": self.asked.chat.request.sampling.top_p,
            "truncation": "disabled",
            "usage": told,
            "metadata": said["metadata"] or {},
            "store": False,
        }
