"""What each family supports, as it was measured: a table for docs/support.md and `llmkit doctor --support`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

COLUMNS = ("packed", "tree", "paged", "recompute", "LoRA", "QLoRA", "RoPE", "merge", "export")
YES = "yes"

Table = Mapping[str, Mapping[str, str]]
"""Family -> column -> `yes`, `yes: with this exception`, or the reason why not."""

DATA = Path(__file__).with_name("support.json")
"""Written by `python -m llmkit.build.support`."""

HEAD = """# What each family supports

{count} families of transformers {version}, measured by `python -m llmkit.build.support`; the tests measure it again.
Each runs as a model of 2 layers with random weights, segments of 1 to 11 tokens and windows of 4. `llmkit doctor
--support` prints the table. A `no` has the number of its reason, and a `yes` may have the number of an exception.

- `packed`: many sequences in one row. `tree`: a shared prefix with branches. `paged`: blocks of cached keys and values.
  Logits and every gradient equal those of transformers' own eager attention on each sequence alone, to 1e-10 in fp64
  (`paged` has no gradients).
- `recompute`: the same as `packed`, with activations computed again.
- `LoRA`: on all linear layers; the gradient of every factor is what the chain rule makes of the merged weight's, to
  1e-9 in fp64; where the family can be packed, packed equals alone as above.
- `QLoRA`: LoRA over NF4 weights, computing in fp32; logits (1e-5) and gradients (1e-4) are those over the dequantised
  weights, a step leaves the base as it is bit for bit, and packed equals alone (1e-5).
- `RoPE`: `model.rope` of kind `linear` and `yarn`; logits past the trained length are those of transformers with the
  same scaling written by hand (1e-5), and `linear` by 4 at position 4p is the unscaled model at p.
- `merge`: the merged model's logits are the adapted model's, to 1e-10 in fp64.
- `export`: what llmkit reads and writes again, transformers alone reads with the same weights and logits, bit for bit.

Every model is tried when it is first loaded, listed here or not (what came of it is kept in the cache by all that it
follows from): the last hidden states of two short sequences, without
gradients, must be those of eager attention to 2e-5 in fp32 and to 1e-1 in 16 bits or over quantised weights. Where the
answer is no, packing, trees and the engine are refused by name; padded training works as in transformers, and so does
`generate --generator transformers`.

"""


def measured() -> Table:
    """The table that llmkit ships."""
    table: Table = json.loads(DATA.read_text("utf-8"))["families"]
    return table


def summary(table: Table) -> dict[str, int]:
    """How many families say yes to each column."""
    return {column: sum(said(row[column]) for row in table.values()) for column in COLUMNS}


def said(cell: str) -> bool:
    """Whether a cell is a yes, be it with an exception."""
    return cell == YES or cell.startswith(f"{YES}: ")


def numbered(table: Table) -> tuple[list[list[str]], list[str]]:
    """The rows as texts, and the reasons and exceptions that their numbers stand for, each once."""
    notes: list[str] = []
    rows = [[family, *(_cell(row[column], notes) for column in COLUMNS)] for family, row in table.items()]
    return rows, notes


def _cell(cell: str, notes: list[str]) -> str:
    if cell == YES:
        return YES
    note = cell.removeprefix(f"{YES}: ")
    if note not in notes:
        notes.append(note)
    return f"{YES if said(cell) else 'no'} ({notes.index(note) + 1})"


def page() -> str:
    """All of docs/support.md."""
    rows, notes = numbered(measured())
    version = json.loads(DATA.read_text("utf-8"))["transformers"]
    head = HEAD.format(count=len(rows), version=version)
    lines = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *rows]
    grid = "".join(f"| {' | '.join(line)} |\n" for line in lines).replace(" --- ", "---")
    return head + grid + "\n" + "".join(f"{n}. {note}\n" for n, note in enumerate(notes, 1))


def text() -> str:
    """For a terminal."""
    rows, notes = numbered(measured())
    lines = [["family", *COLUMNS], *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS) + 1)]
    grid = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*grid, "", *(f"({n}) {note}" for n, note in enumerate(notes, 1))]) + "\n"
