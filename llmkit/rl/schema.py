"""Whether an answer is JSON that a schema allows, by jsonschema."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, Never

from llmkit.core.errors import RecipeError, ResourceError
from llmkit.rl.checked import Check, Told, each

FENCE = re.compile(r"```[A-Za-z]*\s*\n(.*?)```", re.DOTALL)


def check(schema: str, where: Literal["whole", "fenced"], key: str = "schema") -> Check:
    """Whether the answer, or what its last fence holds, is valid; `key` is the recipe's, that gives the schema.

    Raises:
        ResourceError: jsonschema is not installed.
        RecipeError: the schema is none.
    """
    valid = _validator(schema, key)

    def score(told: Told) -> float:
        text = told["completion"]
        if where == "fenced":
            fenced = FENCE.findall(text)
            if not fenced:
                return 0.0
            text = fenced[-1]
        try:
            value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
            return float(valid.is_valid(value))
        except (ValueError, RecursionError):  # no JSON, or JSON that nobody could read
            return 0.0

    return each(score)


def _validator(schema: str, key: str) -> Any:
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as cause:
        what = f"jsonschema cannot be imported ({cause})"
        raise ResourceError(what, fix="pip install 'llmkit[schema]'", key="kind") from cause
    try:
        said = json.loads(schema)
        kind = validator_for(said)
        kind.check_schema(said)
    except (ValueError, SchemaError) as cause:
        why = cause.message if isinstance(cause, SchemaError) else str(cause)
        raise RecipeError(f"is no JSON schema ({why[:200]})", fix="mend it", key=key) from cause
    return kind(said, registry=Registry())  # which fetches nothing


def _refuse(word: str) -> Never:
    raise ValueError(f"{word} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made
