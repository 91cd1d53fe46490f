"""`llmkit VERB`: the table of verbs, and the one place where errors are printed.

A verb's heavy half is imported when it is called: `llmkit --help` and a broken recipe meet no torch.
"""

from __future__ import annotations

import signal
import sys
import traceback
from functools import partial
from typing import Annotated, Any, NoReturn

import typer

from llmkit import __version__
from llmkit.cli.asking import chat, generate
from llmkit.cli.bench import app as bench
from llmkit.cli.serve import serve
from llmkit.cli.streams import at_once, flush, leave, open_streams, own_fault, returned, say
from llmkit.core.errors import LlmkitError, Problem, RecipeError
from llmkit.core.ranks import exit_status
from llmkit.core.run import Grants

app = typer.Typer(
    name="llmkit",
    help="Fine-tune, evaluate and ship large language models from recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What the command line's own parser raises, whichever package holds its class."""

INTERRUPTED = Problem("stopped by SIGINT", "run the same command again to go on")
OVERRIDES = "Overrides, such as optim.lr=1e-4 or stages.NAME.steps=9; the later of two wins."
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
Model = Annotated[str, typer.Argument(help="An alias, a Hub id, a model folder, an adapter folder or a run's folder.")]
Code = Annotated[bool, typer.Option("--allow-code", help="Run code that the model's folder brings.")]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"llmkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _every_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the folder of a checkpoint.")] = "auto",
    accept: Annotated[list[str] | None, typer.Option(metavar="KEY", help="May differ from the checkpoint.")] = None,
    allow_code: Code = False,
    allow_nonfinite: Annotated[bool, typer.Option(help="Load weights that hold NaN or infinity.")] = False,
    allow_python: Annotated[
        bool, typer.Option(help="Run Python files that the recipe names; asked once a file.")
    ] = False,
) -> None:
    """Run the stage or the pipeline of a recipe; continue it if it was interrupted."""
    from llmkit.cli.recipes import run as verb

    verb(recipe, overrides or [], resume, Grants(allow_code, allow_nonfinite, allow_python, tuple(accept or ())))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Overrides = None,
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Show the tokens of the first N examples.")] = 0,
    allow_python: Annotated[bool, typer.Option(help="Take Python files that the recipe names as allowed.")] = False,
) -> None:
    """Parse a recipe, render its data, account its memory; change nothing."""
    from llmkit.cli.recipes import check as verb

    verb(recipe, overrides or [], show, allow_python)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="A device by name, such as h100-80gb; this machine's without it.")] = "",
    ranks: Annotated[int, typer.Option(min=0, help="Devices that the run has; those of the launcher at 0.")] = 0,
    json: Json = False,
) -> None:
    """Say what a recipe needs in memory and time on each rank, without running it."""
    from llmkit.cli.planning import plan as verb

    verb(recipe, overrides or [], device, ranks, json)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")] = "",
    overrides: Overrides = None,
    json: Json = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """Print the resolved recipe with the origin of every value."""
    from llmkit.cli.recipes import show as verb

    verb(recipe, overrides or [], json, schema)


@app.command()
def launch(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="torchrun, deepspeed, slurm or kubernetes.")] = "torchrun",
    nodes: Annotated[int, typer.Option(min=1, help="Hosts.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks a host, one for each GPU.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="Ranks compute on CPUs: ask for no GPU.")] = False,
    hostfile: Annotated[str, typer.Option(help="One host a line, such as: node1 slots=8.")] = "",
    node_rank: Annotated[int | None, typer.Option(help="Start this host's part alone, the N-th from 0.")] = None,
    master: Annotated[str, typer.Option(help="Where the first host is reached.")] = "",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the rendezvous.")] = 29500,
    interface: Annotated[str, typer.Option(help="The network interface that ranks use, such as ib0.")] = "",
    restarts: Annotated[int | None, typer.Option(min=0, help="How often ranks are started again.")] = None,
    name: Annotated[str, typer.Option(help="Of the job; the recipe's without it.")] = "",
    time: Annotated[str, typer.Option(help="Slurm's time limit, such as 12:00:00.")] = "",
    option: Annotated[list[str] | None, typer.Option(help="Handed on to sbatch, such as --partition=gpu.")] = None,
    image: Annotated[str, typer.Option(help="The container's image.")] = "llmkit:latest",
    claim: Annotated[str, typer.Option(help="The volume claim that is mounted at /work.")] = "llmkit",
    kind: Annotated[str, typer.Option(help="Of the manifest: job, pytorchjob or trainjob.")] = "job",
    resume: Annotated[str, typer.Option(help="As of run.")] = "auto",
    accept: Annotated[list[str] | None, typer.Option(metavar="KEY", help="As of run.")] = None,
    allow_code: Code = False,
    show: Annotated[bool, typer.Option("--print", help="Show the command or the manifest; start nothing.")] = False,
) -> None:
    """Run a recipe on many devices by a launcher, or show how."""
    from llmkit.cli.launch import launch as verb
    from llmkit.launch.job import Job

    more = [f"--accept={key}" for key in accept or ()] + [f"--resume={resume}"] * (resume != "auto")
    run = (*more, *("--allow-code",) * allow_code)
    where = (nodes, gpus, cpu, hostfile, node_rank, master, port, interface, restarts)
    asked = (name, time, tuple(option or ()), image, claim, kind)
    verb(Job(recipe, tuple(overrides or ()), *where, *asked, run), engine, show)


@app.command()
def status(
    target: Annotated[str, typer.Argument(help="A recipe file, or the folder of a run or of a pipeline.")],
    overrides: Overrides = None,
    profile: Annotated[int, typer.Option(min=0, help="Ask the run for a trace of its next N steps.")] = 0,
    json: Json = False,
) -> int:
    """Say what became of a run; exit as it did: 0 done, 75 stopped, its own status if it failed."""
    from llmkit.cli.status import status as verb

    return verb(target, overrides or [], json, profile)


app.command()(generate)
app.command()(chat)


app.command()(serve)
app.add_typer(bench)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A recipe file or a model.")],
    overrides: Overrides = None,
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas, when TARGET is a model.")] = "",
    to: Annotated[str, typer.Option(help="The folder of the results.")] = "",
) -> None:
    """Run the tasks of a recipe, or named tasks over a model."""
    from llmkit.cli.recipes import evaluate as verb

    verb(target, overrides or [], tasks, to)


@app.command()
def merge(
    model: Model,
    to: Annotated[str, typer.Option(help="The folder of the result.")],
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Fold an adapter into its base, behind a gate on the difference of the logits."""
    from llmkit.cli.recipes import merge as verb

    verb(model, to, precision)


@app.command()
def report(folder: Annotated[str, typer.Argument(help="A run's folder, or a pipeline's.")]) -> None:
    """Write the pages again, and print where they are."""
    from llmkit.cli.runs import report as verb

    verb(folder)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A run's folder.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    json: Json = False,
) -> None:
    """Say what differs between two runs: recipe, data, versions, results."""
    from llmkit.cli.runs import diff as verb

    verb(a, b, json)


@app.command()
def runs(folder: Annotated[str, typer.Argument(help="Where to look.")] = "runs", json: Json = False) -> None:
    """List the runs of a folder."""
    from llmkit.cli.runs import runs as verb

    verb(folder, json)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="A finished run's folder.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is public.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")] = False,
) -> None:
    """Send a result to the Hugging Face Hub with a model card; nothing is ever sent without this or a push key."""
    from llmkit.cli.runs import push as verb

    verb(folder, repo, public, dry_run)


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="An alias or a Hub id.")], json: Json = False) -> None:
    """Bring a model into the cache."""
    from llmkit.cli.setup import fetch as verb

    verb(name, json)


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="Copy this one into the working folder.")] = "",
) -> None:
    """List the recipes that llmkit ships, or copy one."""
    from llmkit.cli.setup import recipes as verb

    verb(name)


@app.command("import")
def import_config(
    file: Annotated[str, typer.Argument(help="A configuration of axolotl, LLaMA-Factory or TRL.")],
    to: Annotated[str, typer.Option(help="The recipe's file; NAME.recipe.yaml without it.")] = "",
    tool: Annotated[str, typer.Option(help="axolotl, llama-factory or trl, where the file does not show it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over files that are there.")] = False,
    json: Json = False,
) -> None:
    """Turn a configuration of another tool into a recipe; list what has no counterpart."""
    from llmkit.cli.importing import import_config as verb

    verb(file, to, tool, force, json)


@app.command()
def quickstart(out: Annotated[str, typer.Option(help="The run's folder.")] = "runs/quickstart") -> None:
    """Fine-tune a small model on Python docstrings made from your own Python, and see what it learned."""
    from llmkit.cli.quickstart import quickstart as verb

    verb(out)


@app.command()
def prove(
    what: Annotated[str, typer.Argument(help="recipe, cluster or speculation.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE|MODEL] [KEY=VALUE]...", help=OVERRIDES)] = None,
    ranks: Annotated[int, typer.Option(min=0, help="The most ranks of this machine; 2, or all its GPUs, at 0.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of `recipe`: optimizer steps of each way.")] = 2,
    recipe: Annotated[str, typer.Option("--recipe", help="Of `cluster`: a recipe in place of a tiny one.")] = "",
    to: Annotated[str, typer.Option("--out", help="Of `cluster`: the JSON file that it leaves.")] = "cluster.json",
    only: Annotated[str, typer.Option(help="Of `cluster`, `speculation`: names of parts, with commas.")] = "",
    draws: Annotated[int, typer.Option(min=1, help="Of `speculation`: texts of which laws are counted.")] = 100_000,
    sequences: Annotated[int, typer.Option(min=1, help="Of `speculation`: answers that are compared.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of `speculation`.")] = 0,
    json: Json = False,
) -> int:
    """Run a few steps of a recipe cut up in several ways and compare (exit 6 if they differ); or prove a cluster, or
    that drafts change nothing of what is made."""
    given = list(words or ())
    if what == "speculation":
        from llmkit.cli.speculation.parts import Asked
        from llmkit.cli.speculation.verb import speculation

        if len(given) > 1:
            raise RecipeError(f"{given[1]} is one word too many", fix="name one model")
        return speculation(Asked(seed, draws, sequences, given[0] if given else recipe), only, json)
    if not recipe and given and "=" not in given[0]:
        recipe, given = given[0], given[1:]
    if what == "cluster":
        from llmkit.cli.acceptance.verb import cluster

        return cluster(recipe, given, ranks, to, only, json)
    if what != "recipe":
        raise RecipeError(f"{what} cannot be proved yet", fix="use prove recipe RECIPE, cluster or speculation")
    if not recipe:
        raise RecipeError("no recipe is named", fix="use llmkit prove recipe RECIPE")
    from llmkit.cli.prove import recipe as verb

    return verb(recipe, given, ranks or 2, steps, json)


@app.command()
def doctor(
    json: Json = False,
    support: Annotated[bool, typer.Option("--support", help="Print what each model family supports.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Measure all ranks; start it by a launcher.")] = False,
    disk: Annotated[str, typer.Option(help="With --cluster: the folder whose disk is measured.")] = ".",
) -> None:
    """Report versions, devices, and which fast rows are live and why; what families support; or how a cluster does."""
    if cluster:
        from llmkit.cli.cluster import cluster as measure

        measure(disk, json)
        return
    from llmkit.cli.setup import doctor as verb
    from llmkit.cli.setup import support as table

    (table if support else verb)(json)


def main() -> NoReturn:
    """The command line: exit status 0 done, 2 recipe or usage, 3 data, 4 model, 5 resource, 6 peers, 75 resumable."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [w for w in sys.argv[1:] if not w.startswith(("--local_rank=", "--local-rank="))]
    debug = "--debug" in words
    open_streams()
    words = [w for w in words if w != "--debug"]
    sys.excepthook = partial(own_fault, debug)
    code = _guarded(words, debug)
    flush()
    leave(code)
    at_once(code)
    sys.exit(code)


def _verb(context: Any) -> str:
    """The words of a verb, as they are typed before its flags."""
    if context is None or context.parent is None:
        return ""
    return f"{_verb(context.parent)}{context.info_name} "


def _guarded(words: list[str], debug: bool) -> int:
    try:
        # not app(words): that puts typer's own hook in the place of ours
        code = returned(typer.main.get_command(app)(words, standalone_mode=False))
        return say([INTERRUPTED], 75) if code == 130 else code  # the parser's own word for Ctrl-C
    except USAGE as usage:
        if type(usage).__name__ == "NoArgsIsHelpError":
            usage.show()
            return 2
        context = getattr(usage, "ctx", None)
        return say([Problem(usage.format_message().rstrip("."), f"see llmkit {_verb(context)}--help")], 2)
    except (typer.Abort, KeyboardInterrupt):
        return say([INTERRUPTED], 75)
    except LlmkitError as error:
        if debug:
            traceback.print_exc()
        return exit_status(say(error.problems if error.speaks is not False else (), error.code, error.speaks))
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):
            return 0  # the reader has gone: nothing more to say to it
        raise
