"""The token cache: what a source gives under one law, made once and read through maps of its files.

An entry is of one source, so that a changed weight makes nothing again and a new source only itself. Its key is the
sha256 of all that decides what is in it: the source's files, its own keys, template, tokenizer, the keys of `data` that
rendering reads, the versions of the libraries, and the text of this package's modules.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmkit.core.errors import DataError
from llmkit.core.shelf import Held, entry, key_of
from llmkit.data.chunk import Chunk, Law
from llmkit.data.helpers import chunks
from llmkit.data.lint import Lint
from llmkit.data.lint_store import state
from llmkit.data.node import Readable
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow, Raw

SHELF = "tokens"
UNREAD = ("train", "valid", "held_out", "packing", "bad_share", "lint", "mix", "streaming", "buffer", "on_bad_row")
ORDERS = ("sampler", "length_buckets")
SIFTED = ("dedup", "decontaminate", "contamination")
"""Keys of `data` that change nothing in an example, or order examples or choose among them; any other is part of an
entry's key."""
LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow", "datasets", "numpy")
ARRAYS = {"ids": np.int32, "weights": np.float32, "starts": np.int64, "owners": np.int64, "lines": np.int64}
BITS = 40
"""A place is the number of its file and, in the lower bits, its line."""


@dataclass(frozen=True)
class Part:
    """The examples of one source; example i is [starts[i], starts[i + 1])."""

    arrays: Mapping[str, np.ndarray[Any, Any]]
    """By the names of `ARRAYS`; `owners` says which row each example is of."""
    rows: memoryview
    ends: np.ndarray[Any, Any]
    """Where each row's JSON ends."""
    names: tuple[str, ...]
    """The files that places are in."""
    facts: Mapping[str, Any]
    lint: Lint | None
    held: Held
    """Keeps the entry where it is."""

    def __len__(self) -> int:
        return len(self.arrays["owners"])

    @property
    def digest(self) -> str:
        """sha256 of the tokens, their weights and the bounds of the examples."""
        return str(self.facts["digest"])

    def row(self, index: int) -> bytes:
        """The JSON of a row."""
        return bytes(self.rows[self.ends[index - 1] if index else 0 : self.ends[index]])

    def place(self, example: int) -> tuple[str, int]:
        """File and line of an example's row."""
        said = int(self.arrays["lines"][self.arrays["owners"][example]])
        return self.names[said >> BITS], said & ((1 << BITS) - 1)

    def bad(self) -> Iterator[BadRow]:
        """The rows that were set aside."""
        for what, fix, file, line, text in self.facts["bad"]:
            yield BadRow(what, fix, file, line, text.encode("latin-1"))


def part(source: Readable, law: Law, renderer: Renderer) -> Part:
    """The examples of a source, from the cache or made for it.

    Raises:
        DataError: a row cannot be read and is not to be set aside, or the source changes while it is read.
        ResourceError: the cache cannot be written.
    """
    files = source.files()
    facts = facts_of(source, files, law, renderer)

    def make(folder: Path, alive: Callable[[], None]) -> Mapping[str, Any]:
        made = written(folder, chunks(_read(source, files), law, renderer), law, renderer, alive)
        if source.files() != files:
            raise DataError("changes while it is read", fix="wait until it is whole", file=next(iter(files), ""))
        return {"files": files, **made}

    with entry(SHELF, key_of(facts), make) as held:
        return opened(held, law, renderer)


def _read(source: Readable, files: Mapping[str, str]) -> Iterator[Raw | BadRow]:
    """The rows; a disk that fails while they are read is the source's fault, not the cache's."""
    try:
        yield from source.rows()
    except OSError as cause:
        file = str(cause.filename or next(iter(files), ""))
        what = f"cannot be read to its end ({os.strerror(cause.errno or 0)})"
        raise DataError(what, fix="see whether its disk or store answers", file=file) from cause


def facts_of(source: Readable, files: Mapping[str, str], law: Law, renderer: Renderer) -> dict[str, Any]:
    """All that decides what an entry holds."""
    said, data = asdict(source), asdict(law.data)
    said.pop("weight", None)
    said.get("source", {}).pop("weight", None)  # of what a part is held out
    return {
        "source": said,
        "files": dict(files),
        "data": {name: value for name, value in data.items() if name not in (*UNREAD, *ORDERS, *SIFTED)},
        "strict": law.strict,
        "documents": law.documents,
        "lint": [law.linted, law.sketches],
        "tokenizer": tokenizer_digest(renderer.tokenizer),
        "code": code(),
    }


@cache
def code() -> dict[str, str]:
    """What the examples are made by: the text of this package, and the versions of the libraries under it."""
    made = {"python": sys.version}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    for name in LIBRARIES:
        try:
            made[name] = version(name)
        except PackageNotFoundError:
            continue
    return made | {"llmkit.data": digest.hexdigest()}


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of all that a tokenizer's ids depend on, and of its chat template."""
    said = tokenizer.backend_tokenizer.to_str()
    said = said[said.find('"added_tokens"') :]  # what stands before it is how the last batch was padded and cut
    held = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([said, *held], default=str, sort_keys=True).encode()).hexdigest()


def written(
    folder: Path, made: Iterable[Chunk], law: Law, renderer: Renderer, alive: Callable[[], None]
) -> dict[str, Any]:
    """Writes an entry's files chunk by chunk; gives what is to be said of it."""
    counts, bad, first, lint = Counter[str](), [], "", law.lint(renderer)
    names: dict[str, int] = {}
    digests = {name: hashlib.sha256() for name in ("ids", "weights", "starts")}
    at = rows = bytes_ = learned = 0
    files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in (*ARRAYS, "rows", "ends")}

    def put(name: str, values: Any, kind: Any) -> None:
        raw = np.asarray(values, dtype=kind).tobytes()
        files[name].write(raw)
        if name in digests:
            digests[name].update(raw)

    try:
        put("starts", [0], np.int64)
        for one in made:
            put("ids", one.ids, np.int32)
            put("weights", one.weights, np.float32)
            put("starts", [at + end for end in accumulate(one.lengths)], np.int64)
            put("owners", [rows + owner for owner in one.owners], np.int64)
            put("lines", [names.setdefault(f, len(names)) << BITS | line for f, line in one.places], np.int64)
            put("ends", [bytes_ + end for end in accumulate(map(len, one.rows))], np.int64)
            files["rows"].write(b"".join(one.rows))
            at, rows, bytes_ = at + len(one.ids), rows + len(one.rows), bytes_ + sum(map(len, one.rows))
            counts.update(one.counts)
            learned += int((one.weights > 0).sum())
            bad += [(b.problems[0], b.text.decode("latin-1")) for b in one.bad]
            first = first or one.first
            if lint is not None and (seen := law.lint(renderer, one.lint)) is not None:
                lint.merge(seen)
            alive()
    finally:
        for file in files.values():
            file.close()
    digest = hashlib.sha256(b"".join(part.digest() for part in digests.values())).hexdigest()
    told = [[problem.what, problem.fix, problem.file, problem.line, text] for problem, text in bad]
    facts = {"counts": dict(counts), "learned": learned, "first": first, "names": list(names), "digest": digest}
    return facts | {"bad": told} | {"lint": _kept(folder, state(lint)) if lint is not None else None}


def _kept(folder: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Lint's numbers in files of their own, and the rest of it."""
    for name, raw in said.pop("columns").items():
        (folder / f"lint-{name}").write_bytes(raw)
    (folder / "lint").write_bytes(said.pop("sketched"))
    return said


def _lint(held: Held) -> dict[str, Any] | None:
    said = held.facts["lint"]
    if said is None:
        return None
    columns = {name.removeprefix("lint-"): name for name in held.sizes if name.startswith("lint-")}
    read = {column: (held.folder / name).read_bytes() for column, name in columns.items()}
    return {**said, "columns": read, "sketched": (held.folder / "lint").read_bytes()}


def opened(held: Held, law: Law, renderer: Renderer) -> Part:
    """An entry's files, mapped."""
    arrays = {name: np.frombuffer(_mapped(held, name), dtype=kind) for name, kind in ARRAYS.items()}
    said = _lint(held)
    return Part(
        arrays,
        _mapped(held, "rows"),
        np.frombuffer(_mapped(held, "ends"), dtype=np.int64),
        tuple(held.facts["names"]),
        held.facts,
        law.lint(renderer, said) if said is not None else None,
        held,
    )


def _mapped(held: Held, name: str) -> memoryview:
    if not held.sizes[name]:
        return memoryview(b"")
    with (held.folder / name).open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
