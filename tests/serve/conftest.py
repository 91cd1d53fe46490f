"""A server over a tiny model, in one process: the engine's half runs in a thread of it, over the same socket."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import httpx
import pytest

from llmkit.build.adapters_of import Beside
from llmkit.inference.cache import Cache
from llmkit.inference.node import OwnEngine
from llmkit.models.node import ModelRef
from llmkit.serve.messages import Link
from llmkit.serve.remote import Remote
from llmkit.serve.served import served_of
from llmkit.serve.start import Settings, assemble
from llmkit.serve.worker import Worker
from tests.conftest import make_tokenizer


def url(own):
    return f"http://127.0.0.1:{own.getsockname()[1]}" if own else ""


TOOLED = (
    "{% if tools %}Call within <tool_call></tool_call>: {% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.get('tool_calls') or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that knows tools."""
SMALL = OwnEngine(cache=Cache(size=8 << 20))


class Thread:
    """In the place of a process."""

    pid = 0

    def __init__(self, own, llm, root=None, most=16, how=SMALL):
        self.beside, self.how = Beside(root=root, most=most), how
        self.served = None
        self.own = own.dup()
        self.own.setblocking(True)
        self.thread = threading.Thread(target=self._run, args=(llm,), daemon=True)
        self.thread.start()

    def _run(self, llm):
        link = Link(self.own)
        try:
            assert link.first(10)
            self.served = served_of(llm.loaded, self.how, self.beside)
            Worker(link, self.served).run()
        finally:
            self.own.close()  # as a process that ends does

    def poll(self):
        return None if self.thread.is_alive() else 0

    def kill(self):
        with contextlib.suppress(OSError):
            self.own.shutdown(2)


@pytest.fixture(scope="session")
def llm(tiny):
    from llmkit.build.llm import LLM

    return LLM(str(tiny))


class Running:
    """A server that answers on a port, in a thread."""

    def __init__(self, llm, admin=False, **how):
        from llmkit.serve.run import listen

        self.loop = asyncio.new_event_loop()
        given = how.get("adapter_root"), how.get("most_adapters", 16), how.get("engine", SMALL)
        self.engine = Remote({"loaded": {}}, lambda theirs: Thread(theirs, llm, *given))
        own, other = listen("127.0.0.1", 0), listen("127.0.0.1", 0) if admin else None
        settings = Settings(ModelRef(name="tiny"), **how)
        self.places = assemble(settings, self.engine, llm.tokenizer, own, other)
        self.door, self.service = self.places[0].door, self.places[0].door.service
        self.url, self.admin = url(own), url(other)
        self.task, self.failed = None, []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        with httpx.Client(base_url=self.url) as client:
            while client.get("/health").status_code != 200:
                assert not self.failed, self.failed

    def _run(self):
        from llmkit.serve.run import run

        asyncio.set_event_loop(self.loop)
        self.task = self.loop.create_task(run(self.places, self.engine, self.service.bounds))
        with contextlib.suppress(asyncio.CancelledError):
            try:
                self.loop.run_until_complete(self.task)
            except Exception as cause:
                self.failed.append(cause)
                raise

    def call(self, verb, **asked):
        """What the engine's half says to it."""
        return asyncio.run_coroutine_threadsafe(self.engine.call(verb, **asked), self.loop).result(30)

    @property
    def within(self):
        """The engine itself, which is in another thread."""
        return self.engine.process.served.engine

    def stop(self):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive() and not self.failed


@pytest.fixture(scope="session")
def server(llm):
    running = Running(llm)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tooled(llm):
    """The same model under a template that knows tools."""
    return SimpleNamespace(loaded=llm.loaded, tokenizer=make_tokenizer(TOOLED))


@pytest.fixture(scope="session")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
