"""From sources to token ids with weights, everything counted; what was made before is taken from the cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.cache import Part, part
from llmkit.data.chunk import Law
from llmkit.data.node import Data, Readable
from llmkit.data.prepared import Places, Prepared, Rows, joined
from llmkit.data.render import Renderer
from llmkit.data.rows import BadRow
from llmkit.data.sift import sifted
from llmkit.data.usable import Tally

__all__ = ["Prepared", "prepare", "template_digest"]


def prepare(
    sources: Sequence[Readable],
    data: Data,
    tokenizer: Any,
    key: str = "data.train",
    aside: Callable[[BadRow], None] | None = None,
    least: int = 1,
    documents: bool = False,
) -> Prepared:
    """All examples of `sources`, at least `least` of them; `documents` says that each row is one, and has its end.

    Raises:
        DataError: a row cannot be read, too many are unusable, or too few are left.
        ResourceError: the cache cannot be written.
    """
    renderer = Renderer(tokenizer, data.train_on, data.train_reasoning)
    strict = data.on_bad_row == "error" or aside is None
    laws = [Law(data, source.columns, bool(data.sources("valid")), strict, documents) for source in sources]
    parts = [part(source, law, renderer) for source, law in zip(sources, laws, strict=True)]
    tally = Tally(data, Counter[str](), aside, lint=laws[0].lint(renderer) if laws else None)
    for one in parts:
        _told(one, tally)
    tally.check(sum(map(len, parts)), least, key)
    made = _together(parts, tally)
    if key == "data.train":
        made = sifted(made, data)
        tally.counts.update({name: n for name, n in made.counts.items() if name.startswith("left out")})
        tally.check(len(made), least, key)
    return made


def _told(one: Part, tally: Tally) -> None:
    """Says again what was said when the part was made."""
    tally.counts.update(one.facts["counts"])
    tally.first = tally.first or one.facts["first"]
    if tally.aside is not None:
        for bad in one.bad():
            tally.aside(bad)
    if tally.lint is not None and one.lint is not None:
        tally.lint.merge(one.lint)


def _together(parts: Sequence[Part], tally: Tally) -> Prepared:
    arrays = {name: [part.arrays[name] for part in parts] for name in ("ids", "weights", "starts")}
    bases = (0, *accumulate(map(len, arrays["ids"])))
    starts = [own[1:] + base for own, base in zip(arrays["starts"], bases, strict=False)]
    whole = arrays["starts"][0] if len(parts) == 1 else np.concatenate([np.zeros(1, np.int64), *starts])
    learned = sum(part.facts["learned"] for part in parts)
    counts = dict(tally.counts) | {"examples": len(whole) - 1, "tokens": bases[-1], "supervised tokens": learned}
    digests = [part.digest for part in parts]
    digest = digests[0] if len(parts) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Prepared(
        joined(arrays["ids"]),
        joined(arrays["weights"]),
        whole,
        Rows(parts),
        counts,
        digest,
        _files(parts),
        Places(parts),
        tally.lint,
        begins=(0, *accumulate(map(len, parts))),
    )


def _files(parts: Sequence[Part]) -> dict[str, str]:
    return named({path: digest for part in parts for path, digest in part.facts["files"].items()})


def named(found: Mapping[str, str]) -> dict[str, str]:
    """sha256 by name; by the whole path where two files have one name."""
    names = Counter(Path(path).name for path in found)
    return {Path(path).name if names[Path(path).name] == 1 else path: digest for path, digest in found.items()}


def template_digest(tokenizer: Any) -> str:
    """sha256 of the chat template."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()
