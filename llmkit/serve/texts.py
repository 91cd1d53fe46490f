"""`/tokenize`, `/detokenize` and `/v1/embeddings`: what is asked of a tokenizer or of hidden states alone."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from llmkit.inference.said.choice import offered
from llmkit.serve.asked import until
from llmkit.serve.caller import Caller
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.kinds import parse
from llmkit.serve.prompts import goes_on, messages, own_ids, prompts, tokens_of_chat, tokens_of_text
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Service
from llmkit.serve.shapes import IGNORED, Detokenizing, Embedding, Tokenizing


async def tokenize(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """The tokens of `prompt` (also called `content`), or of `messages` up to where the answer begins; `with_pieces`:
    each with its text.

    Raises:
        Refusal: a field cannot be used.
    """
    said = parse(Tokenizing, fields, service.bounds)
    service.adapter(said.model, caller)
    fields.end()
    for key in ("prompt", "content"):  # beside messages too, where nothing comes of them
        if not isinstance(getattr(said, key), str | None):
            raise wrong(key, "is no text")
    tools = said.tools if offered(said.tools) else ()
    if said.messages is not None:
        talk = messages(fields, service.bounds)
        begun = goes_on(said.continue_final_message, said.add_generation_prompt, talk)
        ids = await tokens_of_chat(service, talk, tools, begun)
    else:
        text = said.content if said.prompt is None else said.prompt
        if text is None:
            raise wrong("prompt", "is not there, and there are no messages")
        special = said.add_special if said.add_special_tokens is None else said.add_special_tokens
        ids = await tokens_of_text(service, text, special)
    pieces, apart = said.with_pieces, said.return_token_strs
    texts = list(map(service.spelling.text, ids)) if pieces or apart else []
    told = [{"id": id, "piece": text} for id, text in zip(ids, texts, strict=True)] if pieces else ids
    made: dict[str, Any] = {"tokens": told, "count": len(ids), "max_model_len": service.longest}
    return made | {"token_strs": texts} if apart else made


async def detokenize(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """The text of `tokens`.

    Raises:
        Refusal: they are none of this model.
    """
    said = parse(Detokenizing, fields, service.bounds)
    service.adapter(said.model, caller)
    ids = own_ids(service, said.tokens, "tokens")
    fields.end()
    text = await service.aside(lambda: str(service.tokenizer.decode(ids)), len(ids))
    return {"prompt": text, "content": text}


async def embeddings(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """`/v1/embeddings`: one vector for each text, of length 1, the mean of its last hidden states.

    Raises:
        Refusal: a field cannot be used, there is no room, or the deadline passed.
    """
    said = parse(Embedding, fields, service.bounds)
    if service.adapter(said.model, caller):
        raise wrong("model", "an adapter has no embeddings", "unsupported_parameter")
    asked = await prompts(service, fields, "input", service.bounds.prompts)
    fields.end(IGNORED)
    longest = service.longest
    if any(len(ids) > longest for ids in asked):
        raise Refusal(400, f"input: a text has more than {longest} tokens", key="input", code="context_length_exceeded")
    tokens = sum(map(len, asked))
    with service.place(caller, len(asked), tokens):
        calls = (service.engine.call("embed", prompt=ids, pooling=said.pooling) for ids in asked)
        try:
            async with asyncio.timeout_at(until(None, caller.deadline, service.bounds)):
                vectors = await asyncio.gather(*calls)
        except TimeoutError:
            raise Refusal(408, "the deadline passed", key="deadline", code="deadline_exceeded") from None
    data = [
        {"object": "embedding", "index": i, "embedding": _formed(v, said.encoding_format)}
        for i, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": said.model or service.name, "usage": usage}


def _formed(vector: list[float], form: str) -> Any:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector
