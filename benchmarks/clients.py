"""Public clients against our server, in an environment of their own: lm-eval and litellm.

    python benchmarks/clients.py --python ENV/bin/python     # an environment with lm-eval[api,hf], litellm and torch

lm-eval runs three small tasks (choices, perplexity, text) twice: through `local-completions` on a server of a tiny
model, and through its own `hf` backend on the same folder. Exits 1 where a figure or a log-likelihood differs by more
than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
BAR = 1e-6
TEXT = "the quick brown fox jumps over lazy dog a model is trained on rows of text and asked what it learned"
WORDS = TEXT.split()
TASKS = {
    "small_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "small_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "small_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    },
}
LITELLM = """
import json, sys
from litellm import completion
how = dict(model="openai/tiny", api_base=sys.argv[1] + "/v1", api_key="x", temperature=0.0, max_tokens=8,
           messages=[{"role": "user", "content": "hello world"}])
whole = completion(**how).choices[0].message.content
parts = [part.choices[0].delta.content or "" for part in completion(stream=True, **how)]
print(json.dumps({"whole": whole, "streamed": "".join(parts)}))
"""


def rows(count: int) -> list[dict[str, Any]]:
    """Sentences by chance."""
    rng = random.Random(5)

    def said(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    return [
        {
            "question": said(8),
            "choices": [" " + said(3) for _ in range(4)],
            "answer": rng.randrange(4),
            "text": said(30),
        }
        for _ in range(count)
    ]


def lay(folder: Path, count: int) -> None:
    """The tasks and their rows, as lm-eval reads them."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))


def evaluated(python: str, folder: Path, model: str, args: str) -> dict[str, Any]:
    """Figures, and the answers to each row."""
    out = folder / model
    words = ["-m", "lm_eval", "--model", model, "--model_args", args, "--tasks", ",".join(TASKS)]
    more = ["--include_path", str(folder), "--output_path", str(out), "--log_samples", "--batch_size", "1"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "x"}
    subprocess.run([python, *words, *more], check=True, env=env, stdout=sys.stderr)
    found: dict[str, Any] = {}
    (results,) = out.rglob("results_*.json")
    found["figures"] = {name: own for name, own in json.loads(results.read_text())["results"].items()}
    for path in sorted(out.rglob("samples_*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        name = next(name for name in TASKS if name in path.name)
        found[name] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Every leaf by its place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {at: value}
    return {place: leaf for key, inner in items for place, leaf in flat(inner, f"{at}/{key}").items()}


def number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, list[str]]:
    """The largest difference, relative to a figure above 1, and what differs otherwise."""
    a, b = flat(ours), flat(theirs)
    worst, others = 0.0, [place for place in a.keys() ^ b.keys()]
    for place in a.keys() & b.keys():
        x, y = number(a[place]), number(b[place])
        if x is None or y is None:
            others += [place] * (a[place] != b[place])
        else:
            worst = max(worst, abs(x - y) / max(1.0, abs(y)))
    return worst, others


def main() -> int:
    from llmkit.build.llm import LLM
    from tests.conftest import make_model, make_tokenizer
    from tests.serve.conftest import Running

    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    parser.add_argument("--rows", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        make_model().save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        lay(folder, given.rows)
        running = Running(LLM(str(model)))
        try:
            address = f"model=tiny,base_url={running.url}/v1/completions,tokenizer={model},max_length=512"
            ours = evaluated(given.python, folder, "local-completions", address)
            said = subprocess.run(
                [given.python, "-c", LITELLM, running.url],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
                env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the network at import
            )
        finally:
            running.stop()
        theirs = evaluated(given.python, folder, "hf", f"pretrained={model},dtype=float32,max_length=512")
    worst, others = compare(ours, theirs)
    lite = json.loads(said.stdout.splitlines()[-1])
    print(json.dumps({"largest": worst, "other": others, "figures": ours["figures"], "litellm": lite}))
    return int(worst > BAR or bool(others) or lite["whole"] != lite["streamed"] or not lite["whole"])


if __name__ == "__main__":
    sys.exit(main())
