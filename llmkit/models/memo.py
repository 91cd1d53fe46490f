"""What a model made of texts once (hidden states, laws), by those texts: one that stays as it is makes them alike."""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmkit.core.errors import ResourceError
from llmkit.core.files import refused
from llmkit.core.metrics import Lines


class Memo:
    """Rows of `width` numbers, in a file that the next start of a run reads too."""

    def __init__(self, path: Path, width: int, of: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """`of`: what the rows are made with; what was made with anything else is forgotten.

        Raises:
            ResourceError: the file cannot be opened.
        """
        self.path, self.width, self.index = path, width, Lines(path.with_suffix(".jsonl"))
        self.dtype, self.size = dtype, width * dtype.itemsize
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as cause:
            raise refused(cause, "opening", path) from cause
        lines = self.index.after({"of": of, "width": width})
        self.known = {line["text"]: (line["at"], line["rows"], line["crc"]) for line in lines}
        self.end = max((at + rows for at, rows, _ in self.known.values()), default=0)

    def get(self, tokens: Tensor) -> Tensor | None:
        """The rows of a text (L,), (L, width); None where they were not made, or the file was hurt."""
        found = self.known.get(_name(tokens))
        if found is None:
            return None
        at, rows, crc = found
        data = os.pread(self.file, rows * self.size, at * self.size)
        if zlib.crc32(data) != crc:  # a machine that stopped may have lost what its index tells of
            return None
        return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(self.dtype).view(rows, self.width)

    def put(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Keeps the rows of a text; gives them as they are kept.

        Raises:
            ResourceError: the disk refuses.
        """
        kept = rows.to("cpu", self.dtype).contiguous()
        data, at = kept.view(torch.uint8).numpy().tobytes(), self.end
        try:
            written = os.pwrite(self.file, data, at * self.size)
        except OSError as cause:
            raise refused(cause, "writing", self.path) from cause
        if written < len(data):
            raise ResourceError("the disk is full", fix="free some space", file=str(self.path))
        text, crc = _name(tokens), zlib.crc32(data)
        self.index.add({"text": text, "at": at, "rows": len(kept), "crc": crc})
        self.known[text] = at, len(kept), crc
        self.end = at + len(kept)
        return kept

    def remove(self) -> None:
        """Nobody asks again."""
        os.close(self.file)
        self.path.unlink(missing_ok=True)
        self.index.path.unlink(missing_ok=True)


def _name(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.to("cpu", torch.int32).numpy().tobytes()).hexdigest()[:32]
