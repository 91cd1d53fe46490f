"""How many words make a prompt of so many tokens: no tokenizer is here, but the server tells what it counted."""

from __future__ import annotations

from dataclasses import replace

from llmkit.core.errors import ResourceError
from llmkit.serve.bench.drive import drive
from llmkit.serve.bench.load import Load, Made
from llmkit.serve.bench.shot import Send


async def aimed(made: Made, tokens: int, shared: int, send: Send, timeout: float) -> Made:
    """The same with as many words as `tokens` take, of which `shared` tokens are the same in all, by one request.

    Raises:
        ResourceError: the server does not answer it.
    """
    trial = replace(made, words=max(tokens, 1), shared=0, output=1, seed=made.seed + 1)
    shot = (await drive(Load(1, concurrency=1, timeout=timeout), trial.asked(), send)).shots[0]
    if shot.error and shot.error not in ("the answer is empty",):
        raise ResourceError(f"the first request failed: {shot.error}", fix="see that the server answers", key="URL")
    words_a_token = trial.words / shot.prompt_tokens if shot.prompt_tokens else 1.0
    return replace(made, words=max(1, round(tokens * words_a_token)), shared=round(shared * words_a_token))
