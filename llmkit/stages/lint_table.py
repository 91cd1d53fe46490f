"""The table of what lint found: judged, printed, and kept in the run's folder for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmkit.core.errors import DataError, one_line
from llmkit.core.files import write_atomic
from llmkit.data.cleaning import NoDedup
from llmkit.data.findings import Finding
from llmkit.data.node import Data
from llmkit.data.prepare import Prepared
from llmkit.models.node import ModelRef
from llmkit.models.resolve import Resolved
from llmkit.models.tokenizer import read_tokenizer

FILE = "lint.json"
ASKED = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})


def linted(
    data: Data, train: Prepared, valid: Prepared | None, more: Sequence[Finding] = ()
) -> dict[str, tuple[Finding, ...]]:
    """What was found in each data set, by its key; `more` are findings of no row.

    Raises:
        DataError: there are warnings, and `data.lint` says that they are errors.
    """
    found: dict[str, tuple[Finding, ...]] = {}
    if train.lint is not None:
        rest = tuple(finding for finding in more if finding.name not in data.lint.allow)
        allow = data.lint.allow if data.dedup == NoDedup() else (*data.lint.allow, "duplicate")  # they are left out
        found["data.train"] = train.lint.findings(valid.lint if valid is not None else None, allow) + rest
    if valid is not None and valid.lint is not None:
        found["data.valid"] = valid.lint.findings(None, data.lint.allow)
    wrong = [(key, finding) for key, many in found.items() for finding in many if finding.level == "warn"]
    if data.lint.level == "error" and wrong:
        key, first = wrong[0]
        place = first.places[0] if first.places else None
        names = ", ".join(f"{finding.name} {finding.count}" for _, finding in wrong)
        raise DataError(
            f"lint finds {names}; the first: {first.what}" + (f" ({place.detail})" if place and place.detail else ""),
            fix=f"{first.fix}, or add it to data.lint.allow",
            file=place.file if place else "",
            line=place.line if place else 0,
            key=key,
        )
    return found


def served(resolved: Resolved, ref: ModelRef, tokenizer: Any, code: bool = False) -> tuple[Finding, ...]:
    """Whether the recipe's template writes what the model's own does, which other servers of the base will use; `code`:
    whether that of the model's folder may run.
    """
    if ref.template is None:
        return ()
    own = read_tokenizer(resolved, replace(ref, template=None), code)
    if not own.chat_template or _written(own) == _written(tokenizer):
        return ()
    what, fix = "model.template writes other text than the model's own template", "serve the result with its template"
    return (Finding("template", "info", 1, 0, what, fix),)


def _written(tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(ASKED), tokenize=False, add_generation_prompt=True))
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as cause:
        return f"refused: {type(cause).__name__}"


def lines(found: dict[str, tuple[Finding, ...]]) -> Iterator[str]:
    """The tables as text, a line a finding; none where nothing was looked for."""
    for key, many in found.items():
        if not many:
            yield f"{key}: lint finds nothing"
            continue
        warnings = sum(finding.level == "warn" for finding in many)
        yield f"{key}: lint: warnings {warnings}, notes {len(many) - warnings}"
        wide = max(len(finding.name) for finding in many)
        for finding in many:
            places = one_line(", ".join(_places(finding)))
            more = ", ..." if finding.count > len(finding.places) > 0 else ""
            where = f": {places}{more}" if places else ""
            yield f"  {finding.level}  {finding.name:<{wide}}  {finding.count:>6}  {finding.what}{where}"


def _places(finding: Finding) -> Iterator[str]:
    """Places, each file named once."""
    last = ""
    for place in finding.places:
        yield str(place).removeprefix(place.file if place.file == last else "")
        last = place.file


def shares(made: Prepared) -> str:
    """The share of tokens by role, as one line; nothing where lint is off."""
    if made.lint is None:
        return ""
    parts = [f"{role} {share:.0%}" for role, share in made.lint.shares().items() if role != "trained"]
    return "tokens by role, about: " + ", ".join(parts)


def brief(found: dict[str, tuple[Finding, ...]]) -> str:
    """The warnings in a few words, or nothing."""
    warnings = [f"{f.name} {f.count}" for many in found.values() for f in many if f.level == "warn"]
    return f"lint: {', '.join(warnings)} (llmkit check tells where)" if warnings else ""


def keep(folder: Path, found: dict[str, tuple[Finding, ...]], train: Prepared) -> None:
    """Writes the tables where the report finds them."""
    said = {key: [asdict(finding) for finding in many] for key, many in found.items()}
    shares = train.lint.shares() if train.lint is not None else {}
    write_atomic(folder / FILE, json.dumps({"findings": said, "shares": shares}, indent=1).encode())
