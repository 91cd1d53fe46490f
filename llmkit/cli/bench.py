"""The verb that measures a server under load."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.core.console import Console
from llmkit.core.errors import RecipeError, ResourceError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
app = typer.Typer(name="bench", no_args_is_help=True, help="Measure a server under load.", rich_markup_mode=None)


@app.callback()
def _one_verb() -> None: ...


@app.command()
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server of the OpenAI routes.")],
    model: Annotated[str, typer.Option(help="As the server names it.")],
    rate: Annotated[float, typer.Option(min=0.0, help="Requests a second, by chance; inf is all at once.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=0, help="So many at a time instead.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="That are measured.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before them that are left out.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt of chance words.")] = 256,
    shared_tokens: Annotated[int, typer.Option(min=0, help="Of these, the same in all.")] = 0,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    data: Annotated[
        str, typer.Option(help="A jsonl file of prompt, messages or turns, in place of chance words.")
    ] = "",
    chat: Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions.")] = False,
    exact: Annotated[bool, typer.Option(help="Go on past the model's own end; not every server can.")] = True,
    slo: Annotated[str, typer.Option(help="Bounds in seconds for goodput: ttft, itl, itl_max, e2e.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and words.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which an answer is given up.")] = 600.0,
    key_variable: Annotated[str, typer.Option(help="The environment variable with the API key.")] = "OPENAI_API_KEY",
    out: Annotated[str, typer.Option(help="NAME of NAME.json and NAME.html.")] = "",
    as_json: Json = False,
) -> None:
    """Measure a server under an open load (--rate) or a closed one (--concurrency)."""
    from llmkit.serve.bench.http import Endpoint
    from llmkit.serve.bench.load import Load
    from llmkit.serve.bench.summary import bounds

    if bool(rate) == bool(concurrency):
        raise RecipeError("takes a rate, or how many at a time", fix="give one of --rate and --concurrency")
    if shared_tokens > prompt_tokens:
        raise RecipeError(
            f"{shared_tokens} is past the prompt's {prompt_tokens}", fix="share less", key="--shared-tokens"
        )
    wanted = bounds(slo)
    load = Load(requests, warmup, rate or math.inf, concurrency, seed, timeout)
    endpoint = Endpoint(url, os.environ.get(key_variable, ""))
    sizes = (prompt_tokens, shared_tokens, output_tokens)
    result = asyncio.run(_measured(endpoint, load, model, sizes, data, chat, exact, wanted))
    _leave(result | {"url": endpoint.shown, "model": model}, out, as_json)


async def _measured(
    endpoint: Any, load: Any, model: str, sizes: tuple[int, int, int], data: str, chat: bool, exact: bool, slo: Any
) -> dict[str, Any]:
    from llmkit.serve.bench.aim import aimed
    from llmkit.serve.bench.drive import drive
    from llmkit.serve.bench.load import Made, from_file, repeated
    from llmkit.serve.bench.summary import summary

    tokens, shared, output = sizes
    asked: Iterator[Any]
    if data:
        asked = repeated(from_file(Path(data), model, output, exact))
    else:
        made = Made(model, tokens, output, 0, exact, chat, load.seed)
        asked = (await aimed(made, tokens, shared, endpoint.send, load.timeout)).asked()
    console = Console()
    console.start("requests", load.all)
    try:
        driven = await drive(load, asked, endpoint.send, lambda done: console.step("requests", done, load.all))
    finally:
        console.end()
    shots = [vars(shot) for shot in driven.shots]
    settings = {name: value if value != math.inf else "inf" for name, value in vars(load).items()}
    return {"version": 1, "load": settings, **summary(load, driven, slo), "shots": shots}


def _leave(result: dict[str, Any], out: str, as_json: bool) -> None:
    """Prints it, writes it, and fails where nothing was answered."""
    from llmkit.cli.bench_page import lines, page_of
    from llmkit.core.files import write_atomic

    if out:
        write_atomic(Path(f"{out}.json"), json.dumps(result, indent=1).encode())
        write_atomic(Path(f"{out}.html"), page_of(result).encode())
    if as_json:
        sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "shots"}) + "\n")
    else:
        sys.stdout.write("\n".join(lines(result)) + "\n")
    if not result["requests"]["done"]:
        why = next(iter(result["errors"]), "")
        raise ResourceError(f"no request was answered: {why}", fix="see that the server answers", key="URL")
