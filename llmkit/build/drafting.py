"""What drafts for a model that is loaded: a smaller one, its own first layers, or a trained head."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from llmkit.build.cache import Caches
from llmkit.build.opening import load
from llmkit.core.errors import ModelError
from llmkit.core.types import Paged, Span
from llmkit.inference.runner import Forward
from llmkit.inference.speculation.corpus import Corpus
from llmkit.inference.speculation.drafter import Drafter
from llmkit.inference.speculation.head import Head
from llmkit.inference.speculation.model import Small
from llmkit.inference.speculation.ngram import Lookup
from llmkit.inference.speculation.retrieval import Retrieval
from llmkit.models import drafts
from llmkit.models.bare import twin
from llmkit.models.decoder import Decoder
from llmkit.models.draft_files import load_head
from llmkit.models.draft_run import HeadRun
from llmkit.models.layers import layers
from llmkit.models.load import How, Loaded
from llmkit.models.node import ModelRef
from llmkit.models.paged import BlockStore
from llmkit.models.positions import steady_length
from llmkit.models.resolve import resolve_at
from llmkit.models.taps import Taps
from llmkit.models.words import other_words

SHORT: dict[torch.dtype, Literal["fp32", "bf16", "fp16"]] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}

REFRESH = "run kind: draft with drafter.start to refresh it"


class Drafting:
    """Makes drafters beside a model."""

    def __init__(self, decoder: Decoder, loaded: Loaded, caches: Caches, forward: Forward | None = None) -> None:
        """`loaded` is the model that is drafted for; `forward` runs all of it, where `decoder` is a part."""
        self.decoder, self.loaded, self.caches, self.forward = decoder, loaded, caches, forward or decoder

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        return self.decoder.words

    def model(self, name: str, width: int = 1) -> Drafter:
        """Another model.

        Raises:
            ModelError: it has other tokens, was made for another model, or cannot read a paged cache.
        """
        ref = ModelRef(name=name)
        self.caches.clear()
        weight, resolved = next(self.decoder.model.parameters()), resolve_at(ref, "speculation.model")
        if (resolved.folder / drafts.NAME).is_file():
            self.made(resolved.folder, "distilled", "speculation.model")
        loaded = load(resolved, ref, How(device=self.decoder.device.type, dtype=SHORT.get(weight.dtype, "fp32")))
        if not loaded.support.paged:
            what = f"{name} cannot be run by the engine: {loaded.support.reason}"
            raise ModelError(what, fix="name another model", key="speculation.model")
        if why := other_words(self.loaded.tokenizer, loaded.tokenizer):
            what = f"{name} has another vocabulary: {why}"
            raise ModelError(what, fix="name a model of the same tokenizer", key="speculation.model")
        return self._small(Decoder(loaded.model), width)

    def shortened(self, count: int, width: int = 1) -> Drafter:
        """The model's own first layers, then its norm and head.

        Raises:
            ModelError: it has no more layers than that.
        """
        own = layers(self.decoder.causal)
        if count >= len(own):
            what = f"{count} layers are not fewer than the {len(own)} of the model"
            raise ModelError(what, fix=f"give 1 to {len(own) - 1}", key="speculation.layers")
        self.caches.clear()
        made = twin(self.decoder.causal)
        for parent in list(made.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.ModuleList) and len(child) == len(own) and child[0] in layers(made):
                    parent._modules[name] = nn.ModuleList(child[:count])
        return self._small(Decoder(made), width)

    def head(self, path: str, width: int) -> Drafter:
        """A trained head over the model's hidden states.

        Raises:
            ModelError: it was made for another model, is no head, or the family tells no hidden states.
        """
        folder = drafts.folder_of(path, "speculation.path")
        self.made(folder, "head", "speculation.path", REFRESH)
        self.caches.clear()
        decoder = self.decoder
        head = load_head(folder, decoder.causal.get_input_embeddings())
        run = HeadRun(head, decoder.device, next(decoder.model.parameters()).dtype)
        taps = Taps(decoder.causal, head.taps)
        one = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        with torch.no_grad():
            self.forward.hidden(one, one, Paged(BlockStore(1, 1), (Span(0, 0, 1, 0, (0,)),)), [""])
        taps.take()  # it can be
        return Head(run, self.caches.beside(run), taps.take, self.words, width)

    def retrieved(self, name: str, own: Lookup) -> Drafter:
        """A corpus, beside what a text itself has.

        Raises:
            ModelError: it is none, or was made for another model.
        """
        folder = drafts.folder_of(name, "speculation.corpus")
        said = self.made(folder, "ngram", "speculation.corpus")
        return Retrieval(Corpus.load(folder, said.settings), own)

    def made(self, folder: Path, kind: str, key: str, again: str = drafts.AGAIN) -> drafts.Made:
        """What a folder says that `kind: draft` left; `again` is the way out where it was made for other weights.

        Raises:
            ModelError: it was, or it is of another kind.
        """
        said = drafts.read(folder, kind, key)
        drafts.check(folder, said, self.loaded.resolved, self.loaded.tokenizer, key, again)
        return said

    def _small(self, decoder: Decoder, width: int) -> Small:
        store = self.caches.beside(decoder)
        longest = steady_length(decoder.causal, store.blocks * store.size)
        return Small(decoder, store, min(self.words, decoder.words), longest, width)
