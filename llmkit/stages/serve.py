"""`kind: serve`: a model over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from llmkit.build.precision import Reading
from llmkit.core.config import Conflict, config, setting
from llmkit.inference.node import OwnEngine
from llmkit.models.node import ModelRef
from llmkit.serve.node import LOOPBACK, Bounds

if TYPE_CHECKING:
    from llmkit.core.artifact import Artifact
    from llmkit.core.run import Run


@config
class Serve:
    """Serve a model over HTTP, as OpenAI's clients speak it, until a signal; what was accepted is finished."""

    kind: Literal["serve"] = "serve"
    model: ModelRef
    """What is served; its `template` is the chat template."""
    host: str = "127.0.0.1"
    """The address that is listened on; another than this machine's own needs `key_file`."""
    port: int = setting(default=8000, least=0, most=65535)
    """0 takes a free one."""
    name: str = ""
    """Under which the model is served; the model's own name without it."""
    key_file: str = ""
    """Keys of 16 letters or more, one a line: KEY [TENANT [rpm=N tpm=N requests=N]]; read again on SIGHUP."""
    hosts: tuple[str, ...] = ()
    """Names beside this machine's own that a server without keys answers to, such as that of a proxy before it."""
    adapters: Mapping[str, str] = setting(default_factory=dict)
    """Name -> folder: each is served under its own name."""
    adapter_root: str = ""
    """Under it an admin may load adapters and weights while the server runs."""
    most_adapters: int = setting(default=16, least=1)
    """Adapters that lie ready at once."""
    admin_port: int | None = setting(default=None, least=0, most=65535)
    """Where admins are listened to; left out, nowhere."""
    admin_key_file: str = ""
    """Their keys."""
    bounds: Bounds = Bounds()
    """What is taken on at most."""
    precision: Reading = "auto"
    """`auto` is fp32 on CPU and bf16 on GPUs."""
    engine: OwnEngine = OwnEngine()
    """Its cache, and what a step holds."""
    playground: bool = True
    """Whether `/` is a page to talk with the model; the page itself asks for no key."""
    record: bool = True
    """Whether `requests.jsonl` gets a line for each request: times, counts and ends, no text."""
    seed: int = setting(default=0, least=0)
    out: str
    """The run's folder."""

    def problems(self) -> Iterator[Conflict]:
        """What contradicts what."""
        if self.host not in LOOPBACK and not self.key_file:
            yield Conflict("host", f"{self.host} can be reached by others", "set key_file too", "key_file")
        if self.admin_port is not None and not self.admin_key_file:
            yield Conflict("admin_port", "asks for no key", "set admin_key_file too", "admin_key_file")

    def settings(self, allow_code: bool = False) -> Any:
        """What the server is started with."""
        from pathlib import Path

        from llmkit.serve.start import Settings

        def path(text: str) -> Path | None:
            return Path(text).expanduser() if text else None

        return Settings(
            self.model,
            self.host,
            self.port,
            self.name,
            path(self.key_file),
            self.bounds,
            self.adapters,
            path(self.adapter_root),
            self.most_adapters,
            self.admin_port,
            path(self.admin_key_file),
            Path(self.out) / "requests.jsonl" if self.record else None,
            self.playground,
            self.precision,
            allow_code,
            self.engine,
            tuple(self.hosts),
        )

    def run(self, run: Run) -> Artifact:
        """Serves until a signal; leaves the record of its requests."""
        from llmkit.core.artifact import publish
        from llmkit.serve.start import start

        facts = start(self.settings(run.grants.code))
        return publish(
            run.folder, {"kind": self.kind, "recipe_digest": run.recipe_digest, "recipe": run.values, **facts}
        )
