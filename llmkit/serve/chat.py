"""`/v1/chat/completions`: what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit.inference.request import Request
from llmkit.inference.said.choice import Chosen, chosen
from llmkit.serve.asked import most_tokens, sampling, until
from llmkit.serve.caller import Caller
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.foretold import category, predicted
from llmkit.serve.form import field_of
from llmkit.serve.generated import Account
from llmkit.serve.kinds import parse
from llmkit.serve.node import Bounds
from llmkit.serve.prompts import goes_on, messages, tokens_of_chat
from llmkit.serve.service import Service
from llmkit.serve.shapes import IGNORED, STREAM_IGNORED, Common, Conversation, StreamOptions


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
    bounds = service.bounds
    common, asked = parse(Common, fields, bounds), parse(Conversation, fields, bounds)
    adapter = service.adapter(common.model, caller)
    said, which = messages(fields, bounds), chosen(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    begun = goes_on(asked.continue_final_message, asked.add_generation_prompt, said)
    prompt = await tokens_of_chat(service, said, asked.tools if which.tools else (), begun)
    given = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    most = most_tokens(given, len(prompt), service.longest, bounds)
    if asked.top_logprobs and not asked.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    how = sampling(fields, bounds, most, {"logprobs": asked.top_logprobs if asked.logprobs else None}, which.schema)
    foretold, usage = await predicted(service, fields), tells_usage(fields, common.stream, bounds)
    fields.end(IGNORED)
    features, shape = {"messages": float(len(said))}, field_of(fields, which.schema)
    account = Account(caller, common.model or service.name, adapter, common.user, features, category(fields), shape)
    last = until(common.deadline, caller.deadline, bounds)
    request = Request(caller.number, prompt, how, adapter, caller.tenant, deadline=last, prediction=foretold)
    return Chat(request, account, common.stream, usage, asked.logprobs, which, service.thinks(prompt))


def tells_usage(fields: Fields, stream: bool, bounds: Bounds) -> bool:
    """Whether a stream tells its usage at its end."""
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "needs stream: true")
    usage = parse(StreamOptions, options, bounds).include_usage
    options.end(STREAM_IGNORED)
    return usage
