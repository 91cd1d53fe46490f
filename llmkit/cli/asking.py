"""The verbs `generate` and `chat`, with all that can be said of how text is made."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmkit.cli.flags import SPECULATION
from llmkit.cli.named import named
from llmkit.core.errors import RecipeError

Model = Annotated[str, typer.Argument(help="An alias, a Hub id, a model folder, an adapter folder or a run's folder.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the K likeliest tokens; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this much of the mass.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens this likely, as a share of the likeliest.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends an answer; may be given again.")]
More = Annotated[
    list[str] | None,
    typer.Option(
        "--sampling", metavar="KEY=VALUE", help="Any other field of Sampling, such as repetition_penalty=1.1."
    ),
]
From = Annotated[str, typer.Option(help="engine, transformers, or more of it: '{kind: engine, sequences: 8}'.")]
Quant = Annotated[str, typer.Option(help="How the weights are held, such as bnb_nf4.")]
Tensor = Annotated[int | None, typer.Option(min=1, help="Processes that hold the model together.")]
Placed = Annotated[str, typer.Option(help="auto, or where its layers lie: '{cuda:0: 10GiB, cpu: 20GiB}'.")]
Drafted = Annotated[str | None, typer.Option(help=SPECULATION)]
Code = Annotated[bool, typer.Option("--allow-code", help="Run code that the model's folder brings.")]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    rows: Annotated[str, typer.Option("--input", help="A jsonl file of prompts, in place of PROMPT.")] = "",
    output: Annotated[str, typer.Option(help="Where the answers to --input go; run again, it goes on.")] = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    n: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    stop: Stop = None,
    sampling: More = None,
    generator: From = "engine",
    quant: Quant = "",
    tensor: Tensor = None,
    placement: Placed = "",
    speculation: Drafted = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, all of it plain.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")
    ] = False,
    allow_code: Code = False,
) -> None:
    """Answer one prompt, or a file of them."""
    from llmkit.cli.text import Asking, generate_file
    from llmkit.cli.text import generate as verb

    if (prompt is None) == (not rows) or bool(rows) != bool(output):
        raise RecipeError("takes a PROMPT, or both --input and --output", fix="give one of the two")
    said: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "top_k": top_k}
    said |= {"top_p": top_p, "min_p": min_p, "n": n, "stop": tuple(stop or ())}
    how: dict[str, Any] = {"tensor": tensor, "placement": placement, "speculation": speculation}
    asking = Asking(model, said, tuple(sampling or ()), generator, quant, raw, allow_code, **how)
    if prompt is not None:
        verb(asking, prompt, json)
    else:
        generate_file(asking, rows, output)


def chat(
    model: Model,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    sampling: More = None,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Answers after /adapter NAME; may be given again.")
    ] = None,
    generator: From = "engine",
    quant: Quant = "",
    tensor: Tensor = None,
    placement: Placed = "",
    speculation: Drafted = None,
    allow_code: Code = False,
) -> None:
    """Talk with a model in the terminal; an empty line ends it, /help lists what else there is."""
    from llmkit.cli.chat import chat as verb
    from llmkit.cli.text import Asking

    said: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "top_k": top_k}
    said |= {"top_p": top_p, "min_p": min_p, "stop": tuple(stop or ())}
    asking = Asking(
        model,
        said,
        tuple(sampling or ()),
        generator,
        quant,
        code=allow_code,
        tensor=tensor,
        placement=placement,
        speculation=speculation,
        adapters=named(adapter or ()),
    )
    verb(asking, system)
