"""The shape of the tree: light modules, sizes, forbidden things."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "llmkit").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "numpy", "scipy", "bitsandbytes", "datasets", "pyarrow", "rich", "tokenizers"}
LIGHT = [
    "llmkit",
    *(f"llmkit.{name}.node" for name in ("models", "adapters", "data", "train", "inference", "losses", "parallel")),
    *(f"llmkit.stages.{name}" for name in ("sft", "classify", "pretrain", "evaluate", "merge", "serve", "trl")),
    *(f"llmkit.recipe.{p.stem}" for p in (ROOT / "llmkit/recipe").glob("*.py") if p.stem != "__init__"),
    "llmkit.cli.main",
    "llmkit.cli.recipes",
    "llmkit.cli.serve",
    "llmkit.serve.node",
    "llmkit.rl.rewards_node",
    "llmkit.rl.scoring",
    "llmkit.rl.bench",
    "llmkit.rl.environment_node",
    *(f"llmkit.{name}" for name in ("cli.launch", "cli.status", "launch.commands", "launch.job", "launch.kubernetes")),
    *(
        f"llmkit.core.{p.stem}"
        for p in (ROOT / "llmkit/core").glob("*.py")
        if p.stem not in ("__init__", "matmul", "recast", "remake")
    ),
    "llmkit.evals.tasks",
    "llmkit.losses.preference_node",
    "llmkit.losses.kto_node",
    "llmkit.build.precision",
    "llmkit.data.source_nodes",
    "llmkit.models.alias",
    "llmkit.models.kinds",
    "llmkit.models.safe",
    "llmkit.models.resolve",
    "llmkit.models.rope",
    "llmkit.models.support",
    "llmkit.parallel.degrees",
]


def test_light_modules_import_nothing_heavy():
    code = f"import sys, importlib\nfor name in {LIGHT!r}: importlib.import_module(name)\n"
    code += f"sys.stdout.write(repr(sorted(set(sys.modules) & {HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]"


def _functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_files_and_functions_stay_small():
    big, worse = [], []
    for path in FILES + KERNELS:
        text = path.read_text()
        sizes = [(path.relative_to(ROOT), len(text.splitlines()), 200, 400)]
        sizes += [(f"{path.relative_to(ROOT)}:{name}", size, 30, 60) for name, size in _functions(ast.parse(text))]
        big += [(str(name), size) for name, size, near, _ in sizes if size > near]
        worse += [(str(name), size) for name, size, _, most in sizes if size > most]
    sys.stdout.write("\n".join(f"{size:5} {name}" for name, size in sorted(big, key=lambda x: -x[1])))
    assert worse == []


LAZY = {
    "llmkit/core/config.py": "a node checks its fields, by what reads nodes",
    "llmkit/models/resolve.py": "names of aliases are known without what fetches them",
    "llmkit/models/fetch.py": "a converter of one format, heavy",
}
"""Modules that import another of ours late, besides nodes and the command line, and why."""


def _late(node, inside=False, verb=False):
    """Imports of our own modules in functions that are no verb of a node."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        config = isinstance(child, ast.ClassDef) and "config" in map(ast.unparse, child.decorator_list)
        if inside and not verb and isinstance(child, ast.Import | ast.ImportFrom):
            names = [getattr(child, "module", None) or alias.name for alias in child.names]
            yield from (name for name in names if name.split(".")[0] == "llmkit")
        yield from _late(child, inside or function, verb or config)


def test_our_own_modules_are_imported_late_by_verbs_alone():
    found = {str(path.relative_to(ROOT)): list(_late(ast.parse(path.read_text()))) for path in FILES}
    late = {path for path, names in found.items() if names and not path.startswith("llmkit/cli/")}
    assert late == set(LAZY)
    node = "@config\nclass A:\n def run(self):\n  from llmkit.x import y\n"
    assert not list(_late(ast.parse(node))) and list(_late(ast.parse(node.replace("@config", "")))) == ["llmkit.x"]


def _libraries(tree):
    """The names that stand for a library, or for something in one."""
    found = set(LIBRARIES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] in LIBRARIES}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            found |= {a.asname or a.name for a in node.names}
    return found


LIBRARIES = {"transformers", "peft", "trl", "torch", "bitsandbytes"}


def _patches(node, libraries):
    """What a statement assigns to in a library: `torch.x = ...`, or `setattr(torch, ...)`."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
        targets = [ast.Attribute(node.args[0], "x")]
    names = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
    return [name for name in names if name.split(".")[0] in libraries]


def test_a_patch_is_seen_through_the_name_it_was_imported_by():
    tree = ast.parse(
        "from transformers.models import llama as m\nimport peft\nm.Llama.forward = f\nsetattr(peft, 'a', 1)"
    )
    assert [_patches(node, _libraries(tree)) for node in tree.body[2:3]] == [["m.Llama.forward"]]
    assert _patches(tree.body[3].value, _libraries(tree)) == ["peft.x"]
    assert _patches(ast.parse("self.x = 1").body[0], _libraries(tree)) == []


BROAD = ("Exception", "BaseException")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_forbidden(path):
    tree = ast.parse(path.read_text())
    libraries = _libraries(tree)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: assert vanishes under -O"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "shelve"} & set(names), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            said = ast.unparse(node.func)
            assert said not in ("torch.load", "torch.save"), f"line {node.lineno}: reads or writes pickles"
            assert said not in ("eval", "exec"), f"line {node.lineno}: runs text"
        if isinstance(node, ast.Assign | ast.Call):
            assert not _patches(node, libraries), f"line {node.lineno}: patches a library"
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in BROAD):
            raised = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raised, f"line {node.lineno}: swallows what nobody foresaw"


def test_generated_pages_are_current():
    from llmkit.recipe.write_docs import pages

    stale = [
        str(path.relative_to(ROOT)) for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    assert not stale, "run `make docs`"


def test_every_shipped_recipe_is_sound(monkeypatch):
    from llmkit.recipe.load import load_recipe

    monkeypatch.chdir(ROOT / "recipes")
    found = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "constitution"]
    assert len(found) >= 6
    for path in found:
        load_recipe(path.relative_to(ROOT / "recipes"))
        assert path.read_text().startswith("# ")
