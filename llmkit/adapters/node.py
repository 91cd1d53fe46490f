"""The recipe's `adapter` node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmkit.adapters.bottleneck import Bottleneck
from llmkit.adapters.limits import Limits
from llmkit.adapters.method import Around, Method
from llmkit.adapters.names import adapted_widths, by, is_span, meant
from llmkit.adapters.prompts import PrefixTuning, PromptTuning, PTuning
from llmkit.adapters.rotations import Boft, Oft
from llmkit.adapters.scaled import Ia3, Vera
from llmkit.core.config import Conflict, config, setting
from llmkit.core.shape import Cost, Shape, is_embedding

if TYPE_CHECKING:
    from torch import nn


@config
class NoAdapter(Method):
    """Every weight is trained, or those that `train` and `freeze` leave."""

    frozen_base: ClassVar[bool] = False
    limits: ClassVar[Limits] = Limits(merge="adapter none trains the weights themselves, so there is nothing to fold")
    learns_tokens: ClassVar[bool] = True
    kind: Literal["none"] = "none"
    train: tuple[str, ...] = ()
    """Globs over parameter names (`*.layers.3?.*`), or endings of them: only these are trained. How many each matches
    is told; one that matches none is an error."""
    freeze: tuple[str, ...] = ()
    """The same for what is not trained, taken from what `train` leaves."""

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Makes weights trainable, but for those of idle modules.

        Raises:
            ModelError: a glob matches nothing, or nothing is left to train.
        """
        from llmkit.adapters.whole import choose

        trained: nn.Module = choose(model, self, around)
        return trained

    def cost(self, shape: Shape) -> Cost:
        """The weights that are trained, by their names in the files; all of them where a glob knows other names."""
        names = shape.tensors
        known = all(any(map(by(glob), names)) for glob in (*self.train, *self.freeze))
        if not (self.train or self.freeze) or not known:
            return Cost(shape.params, head=True)
        held = {name for name in names if not self.train or meant(self.train, name)}
        held = {name for name in held if not meant(self.freeze, name)}
        return Cost(sum(prod(names[name]) for name in held), head=any(map(is_embedding, held)))

    def unfit(self, quant: str) -> tuple[str, str, str] | None:
        """Quantised weights are frozen."""
        what = f"a base held as {quant} is frozen, and adapter none trains its weights"
        return None if quant == "none" else ("kind", what, "use adapter: {kind: lora}, or drop quant")

    def blind(self) -> bool:
        """Weights stay what they are."""
        return True

    def unsplit(self) -> tuple[str, str, str] | None:
        """Weights are cut as they are."""
        return None


@config
class Lora(Method):
    """Low-rank updates beside frozen linears (LoRA, arXiv:2106.09685), through peft and saved in its format."""

    learns_tokens: ClassVar[bool] = True
    kind: Literal["lora"] = "lora"
    rank: int = setting(default=16, least=1)
    alpha: float = setting(default=32.0, above=0.0)
    """The update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = setting(default=0.0, least=0.0, below=1.0)
    targets: Literal["all-linear"] | str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head, and the experts and routers of mixture models), a regular expression over module
    paths, or a list of name endings and of globs over whole names."""
    layers: tuple[int | str, ...] = ()
    """Only in these layers: numbers (-1 is the last) and spans such as `8-15`, `16-` or `-3`, both ends included."""
    parameters: tuple[str, ...] = ()
    """Weights that are no linears too: the experts of a mixture model, such as `experts.gate_up_proj` and
    `experts.down_proj`, or its routers; endings or globs. Each of E experts has factors of its own:
    rank x E x (in + out) parameters."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapter, such as `lm_head`; endings or globs."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens of the vocabulary whose rows of the embeddings (and of a head of its own) are trained and saved with the
    adapter; those that `model.add_tokens` and `model.add_special_tokens` name always are."""
    dora: bool = False
    """Learn magnitudes apart from directions (DoRA, arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    lora_fa: bool = False
    """Train B alone; A stays as it starts, so that inputs need not be kept for it (LoRA-FA, arXiv:2308.03303)."""
    lora_plus: float = setting(default=1.0, above=0.0)
    """B learns at so many times the rate of A (LoRA+, arXiv:2402.12354; its authors take 16)."""
    init: Literal["default", "pissa", "olora", "loftq", "eva"] = "default"
    """Where the factors start. `default`: A at random, B at 0. `pissa` (principal components of the weight,
    arXiv:2404.02948) and `olora` (its QR factors, arXiv:2406.01775) take the start's product out again by a second,
    frozen pair, so the base keeps its bits; the two are saved as one LoRA of twice the rank, for the original base.
    `loftq` (arXiv:2310.08659, one alternation) makes good what `quant: bnb_nf4` lost. `eva` (arXiv:2410.07170,
    equal ranks) takes A from the inputs of the first training rows."""
    pissa_niter: int | None = setting(default=None, least=1)
    """So many subspace iterations of a fast, random SVD instead of the exact one; 16 is near it."""
    eva_tokens: int = setting(default=1024, least=2)
    """Trained positions whose inputs `eva` looks at; it holds them in memory for every linear."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        yield from super().problems()
        if self.parameters:
            what, fix = "peft adapts bare parameters by plain LoRA alone", "leave one of the two out"
            odd = {"dropout": self.dropout > 0, "dora": self.dora, "init": self.init != "default"}
            yield from (Conflict("parameters", what, fix, key) for key, held in odd.items() if held)
        if self.dora and self.init in ("pissa", "olora", "loftq"):
            what = f"the magnitudes that DoRA starts from are those of the base, and {self.init} moves the start"
            yield Conflict("init", what, "leave one of the two out", "dora")
        if self.pissa_niter is not None and self.init != "pissa":
            yield Conflict("pissa_niter", f"init is {self.init}", "set init: pissa, or leave it out", "init")
        if self.lora_fa and self.lora_plus != 1.0:
            yield Conflict("lora_plus", "A is not trained, so there are no two rates", "set optim.lr", "lora_fa")
        for span in self.layers:
            if isinstance(span, str) and not is_span(span):
                fix = "give numbers and spans such as 8-15, 16- or -3"
                yield Conflict("layers", f"{span} is no span of layers", fix)

    def attach(self, model: Any, around: Around = Around()) -> nn.Module:
        """Freezes the base and puts LoRA beside what `targets`, `layers` and `parameters` name, but in idle modules.

        Raises:
            ModelError: one of them names nothing of this model.
        """
        from llmkit.adapters.lora import attach

        adapted: nn.Module = attach(model, self, around)
        return adapted

    def cost(self, shape: Shape) -> Cost:
        """rank x (in + out) of each linear that is adapted (LoRA-FA: rank x out; DoRA: and out), and what is trained
        whole."""
        ins, outs = adapted_widths(shape, self.targets, self.layers, self.parameters)
        pair, frozen = self.rank * (ins + outs), self.rank * ins if self.lora_fa else 0
        whole = {n: prod(s) for n, s in shape.tensors.items() if meant(self.modules_to_save, n.rpartition(".")[0])}
        twice = 2 if self.init in ("pissa", "olora") else 1
        keeps: Literal["shared", "input", "scaled"] = "scaled" if self.dora else "input" if self.dropout else "shared"
        return Cost(
            pair - frozen + (outs if self.dora else 0) + sum(whole.values()),
            more=frozen + (twice - 1) * pair,
            low=twice * self.rank,
            keeps=keeps,
            head=any(map(is_embedding, whole)),
        )

    def unfit(self, quant: str) -> tuple[str, str, str] | None:
        """LoftQ makes good what a quantisation lost, and knows that of nf4."""
        what = f"loftq starts from what bnb_nf4 loses of the weights, and quant is {quant}"
        wrong = self.init == "loftq" and quant != "bnb_nf4"
        return ("init", what, "set quant: bnb_nf4, or use init: default") if wrong else None

    def blind(self) -> bool:
        """Factors that start at random and at 0 need no weight of a linear; copies of modules do."""
        return self.init == "default" and not (self.dora or self.modules_to_save or self.parameters)

    def unsplit(self) -> tuple[str, str, str] | None:
        """A and B are cut with their linear; what reads whole rows or draws at random is not."""
        odd = {
            "dora": (self.dora, "its magnitudes are of whole rows, and a rank holds parts of them"),
            "dropout": (
                self.dropout > 0,
                "ranks that hold a layer together would all draw the same of their own parts",
            ),
            "parameters": (bool(self.parameters), "factors of experts are not cut"),
        }
        fix = "leave it out, or set parallel.tensor=1"
        return next(((key, what, fix) for key, (held, what) in odd.items() if held), None)

    def rate(self, name: str) -> float:
        """LoRA+: B learns faster."""
        return self.lora_plus if ".lora_B." in name or ".lora_embedding_B." in name else 1.0

    def prepare(self, model: Any, batches: Iterable[Any], forward: Callable[[Any], object]) -> None:
        """EVA looks at the first training rows.

        Raises:
            ModelError: they are too few.
        """
        if self.init == "eva":
            from llmkit.adapters.starts import eva

            eva(model, self, batches, forward)

    def finish(self, model: Any) -> None:
        """PiSSA and OLoRA become one plain LoRA of twice the rank."""
        if self.init in ("pissa", "olora"):
            from llmkit.adapters.starts import joined

            joined(model)


Adapter = NoAdapter | Lora | Ia3 | Vera | Oft | Boft | PromptTuning | PrefixTuning | PTuning | Bottleneck
