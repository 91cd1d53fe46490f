"""The verb that serves a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.cli.flags import SPECULATION, speculation_of, tree_of
from llmkit.cli.named import named
from llmkit.core.environment import prepare
from llmkit.core.errors import RecipeError
from llmkit.models.alias import is_remote
from llmkit.models.resolve import resolve
from llmkit.recipe.inputs import remote
from llmkit.recipe.load import load_recipe
from llmkit.stages.serve import Serve

Keys = Annotated[str, typer.Option(help="Keys, 16 letters or more, one a line; asked for on every route but /health.")]
Allowed = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Answered to, where no key is asked for.")]
Named = Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Served under its own name.")]


def serve(
    model: Annotated[str, typer.Argument(help="An alias, a Hub id, a model folder, or a run's folder.")],
    host: Annotated[str | None, typer.Option(help="The address that is listened on; 127.0.0.1 without it.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8000 without it; 0 takes a free one.")] = None,
    api_key_file: Keys = "",
    adapter: Named = None,
    allow_host: Allowed = None,
    recipe: Annotated[str, typer.Option(help="A recipe of kind serve, whose values flags replace.")] = "",
    name: Annotated[str, typer.Option(help="Under which the model is served; MODEL without it.")] = "",
    adapter_root: Annotated[str, typer.Option(help="Under it an admin may load adapters.")] = "",
    admin_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Where admins are listened to.")] = None,
    admin_key_file: Annotated[str, typer.Option(help="Their keys.")] = "",
    template: Annotated[str, typer.Option(help="A chat template: a file, or one of ours by its name.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer, at most.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Of a prompt and its answer; the model's own.")] = None,
    cache_size: Annotated[str, typer.Option(help="Of keys and values, such as 4GiB; a share of what is free.")] = "",
    cache_precision: Annotated[str, typer.Option(help="Of them: auto, fp32, bf16, fp16 or int8.")] = "",
    memory: Annotated[float | None, typer.Option(help="Share of a GPU's free memory that the cache takes.")] = None,
    most_adapters: Annotated[int | None, typer.Option(min=1, help="That lie ready at once; 16 without it.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Answers that depend on no others, or refuse.")] = False,
    tensor: Annotated[int | None, typer.Option(min=1, help="Processes that hold the model together.")] = None,
    placement: Annotated[str, typer.Option(help="auto, or where its layers lie: '{cuda:0: 10GiB, cpu: 20GiB}'.")] = "",
    speculation: Annotated[str | None, typer.Option(help=SPECULATION)] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Answers that wait or are made, at most.")] = None,
    record: Annotated[str, typer.Option(metavar="FOLDER", help="Where requests.jsonl goes.")] = "",
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Run code that the model's folder brings.")] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it."""
    given: dict[str, Any] = {"host": host, "port": port, "key_file": api_key_file, "name": name, "out": record}
    given |= {
        "hosts": allow_host or "",
        "adapter_root": adapter_root,
        "admin_port": admin_port,
        "admin_key_file": admin_key_file,
    }
    given |= {f"adapters.{key}": folder for key, folder in named(adapter or ()).items()}
    given |= {"model.template": template, "bounds.max_tokens": max_tokens, "bounds.requests": requests}
    given |= {"bounds.length": max_length, "engine.cache.size": cache_size, "engine.cache.precision": cache_precision}
    given |= {"engine.cache.memory": memory, "most_adapters": most_adapters, "engine.exact": exact or None}
    given |= {"engine.tensor": tensor, "engine.placement": tree_of(placement, "--placement") if placement else ""}
    given |= {"engine.speculation": "" if speculation is None else speculation_of(speculation)}
    node = _node(model, recipe, {key: value for key, value in given.items() if value not in ("", None)})
    if not Path(model).is_dir():
        resolve(node.model)  # a name that is none is told before the heavy imports
    prepare(remote=is_remote(model) or remote(node))
    from llmkit.serve.start import start

    start(node.settings(allow_code))


def _node(model: str, recipe: str, given: dict[str, Any]) -> Serve:
    """The recipe's settings, or the default ones, under those of the command line."""
    if recipe:
        nodes = [node for _, node in load_recipe(recipe, {"model.name": model, **given}).stages]
        if len(nodes) != 1 or not isinstance(nodes[0], Serve):
            raise RecipeError("is of no kind serve", fix="name one with kind: serve", file=recipe)
        return nodes[0]
    tree: dict[str, Any] = {"record": "out" in given, "out": ".", "model": {"name": model}}
    for key, value in given.items():
        *rooms, last = key.split(".")
        room = tree
        for name in rooms:
            room = room.setdefault(name, {})
        room[last] = value
    return Serve(**tree)
