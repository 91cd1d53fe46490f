"""`/v1/chat/completions`: what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.inference.request import Request
from llmkit.serve.asked import IGNORED, deadline, most_tokens, sampling
from llmkit.serve.caller import Caller
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.generated import Account
from llmkit.serve.prompts import messages, tokens_of_chat
from llmkit.serve.said.choice import Chosen, chosen
from llmkit.serve.service import Service


@dataclass(frozen=True)
class Chat:
    """A conversation that is to be answered."""

    request: Request
    account: Account
    stream: bool
    usage: bool
    """Whether a stream ends with how many tokens there were."""
    logprobs: bool
    chosen: Chosen
    """The tools that may be called."""
    thinking: bool
    """Whether the prompt's end has begun the reasoning."""


async def read(service: Service, fields: Fields, caller: Caller) -> Chat:
    """What the fields of a body ask.

    Raises:
        Refusal, RequestError: a field cannot be used.
    """
    model = fields.text("model")
    adapter = service.adapter(model, caller)
    said, tools, which = messages(fields), fields.items("tools", 128), _tools(fields)
    prompt = await tokens_of_chat(service, said, tools if which.tools else ())
    given = fields.whole_or_none("max_completion_tokens", 1, 1 << 31)
    older = fields.whole_or_none("max_tokens", 1, 1 << 31)
    most = most_tokens(older if given is None else given, len(prompt), service.longest, service.bounds)
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, service.bounds.logprobs)
    if top and not logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    how = sampling(fields, service.bounds, most, {"logprobs": top if logprobs else None}, which.schema)
    stream, usage = streams(fields)
    account = Account(caller, model or service.name, adapter, fields.text("user"), {"messages": float(len(said))})
    until = deadline(fields, service.bounds)
    fields.end(IGNORED)
    request = Request(caller.number, prompt, how, adapter, caller.tenant, deadline=until)
    return Chat(request, account, stream, usage, logprobs, which, service.thinks(prompt))


def _tools(fields: Fields) -> Chosen:
    return chosen(fields.get("tools"), fields.get("tool_choice"), fields.flag("parallel_tool_calls", True))


def streams(fields: Fields) -> tuple[bool, bool]:
    """Whether it is to be streamed, and whether the stream tells its usage."""
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise wrong("stream_options", "needs stream: true")
    usage = options.flag("include_usage")
    options.end(("include_obfuscation",))
    return stream, usage
