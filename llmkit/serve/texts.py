"""`/tokenize`, `/detokenize` and `/v1/embeddings`: what is asked of a tokenizer or of hidden states alone."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

from llmkit.serve.asked import IGNORED
from llmkit.serve.caller import Caller
from llmkit.serve.fields import Fields, wrong
from llmkit.serve.prompts import messages, own_ids, prompts, tokens_of_chat, tokens_of_text
from llmkit.serve.refusal import Refusal
from llmkit.serve.service import Service
from llmkit.serve.told import Spelling


async def tokenize(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """The tokens of `prompt` (also called `content`), or of `messages` up to where the answer begins; `with_pieces`:
    each with its text.

    Raises:
        Refusal: a field cannot be used.
    """
    service.adapter(fields.text("model"), caller)
    if fields.held.get("messages") is not None:
        ids = await tokens_of_chat(service, messages(fields), fields.items("tools", 128))
    else:
        key = "content" if fields.held.get("prompt") is None else "prompt"
        if not isinstance(fields.held.get(key), str):
            raise wrong("prompt", "is no text, and there are no messages")
        special = fields.flag("add_special_tokens", fields.flag("add_special", True))
        ids = await tokens_of_text(service, fields.text(key), special)
    if not fields.flag("add_generation_prompt", True):
        raise wrong("add_generation_prompt", "only what is answered has tokens", "unsupported_parameter")
    pieces, apart = fields.flag("with_pieces"), fields.flag("return_token_strs")
    fields.end()
    texts = [Spelling(service.tokenizer).text(id) for id in ids] if pieces or apart else []
    told = [{"id": id, "piece": text} for id, text in zip(ids, texts, strict=True)] if pieces else ids
    made: dict[str, Any] = {"tokens": told, "count": len(ids), "max_model_len": service.longest}
    return made | {"token_strs": texts} if apart else made


async def detokenize(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """The text of `tokens`.

    Raises:
        Refusal: they are none of this model.
    """
    service.adapter(fields.text("model"), caller)
    ids = own_ids(service, fields.ids("tokens", service.bounds.body), "tokens")
    fields.end()
    text = await service.aside(lambda: str(service.tokenizer.decode(ids)))
    return {"prompt": text, "content": text}


async def embeddings(service: Service, fields: Fields, caller: Caller) -> dict[str, Any]:
    """`/v1/embeddings`: one vector for each text, of length 1, the mean of its last hidden states.

    Raises:
        Refusal: a field cannot be used, or there is no room.
    """
    model = fields.text("model")
    if service.adapter(model, caller):
        raise wrong("model", "an adapter has no embeddings", "unsupported_parameter")
    asked = await prompts(service, fields, "input", service.bounds.prompts)
    form = fields.choice("encoding_format", "float", ("float", "base64"))
    pooling = fields.choice("pooling", "mean", ("mean", "last"))
    fields.end(IGNORED)
    longest = service.longest
    if any(len(ids) > longest for ids in asked):
        raise Refusal(400, f"input: a text has more than {longest} tokens", key="input", code="context_length_exceeded")
    tokens = sum(map(len, asked))
    with service.gate.place(caller, len(asked), tokens):
        calls = (service.engine.call("embed", prompt=ids, pooling=pooling) for ids in asked)
        vectors = await asyncio.gather(*calls)
    data = [{"object": "embedding", "index": i, "embedding": _formed(v, form)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model or service.name, "usage": usage}


def _formed(vector: list[float], form: str) -> Any:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector
