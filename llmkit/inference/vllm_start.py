"""How vLLM is started over a model's files: in this process, or as a server from an environment of its own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
import time
from functools import partial
from typing import IO, Any

import httpx

from llmkit.core.errors import ResourceError, one_line
from llmkit.core.ranks import free_port
from llmkit.inference.cache import ON_CPU
from llmkit.inference.endpoint import Manners
from llmkit.inference.node import Vllm
from llmkit.inference.text import Texts
from llmkit.inference.vllm_served import VllmServed
from llmkit.inference.writer import Files

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GRACE = 30.0
"""Seconds that a server has to end by itself."""
PAUSE = 0.5
SERVER = """
import os, runpy, signal, sys, threading
def watch():
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
"""vLLM's server, which ends with the process that holds the other end of its standard input, however that ends."""


def settings(node: Vllm, files: Files, cpu: bool) -> dict[str, Any]:
    """What vLLM is told of itself. Left alone on a CPU it asks for nearly all of the machine's memory, and does not
    start where less is free: its cache has its size said there."""
    size = node.size if node.size is not None or not cpu else ON_CPU
    made = {
        "model": str(files.folder),
        "dtype": DTYPES[files.precision if node.precision == "auto" else node.precision],
        "max_num_seqs": node.sequences,
        "gpu_memory_utilization": node.memory,
        "tensor_parallel_size": node.tensor,
        "max_logprobs": -1,
        "structured_outputs_config": {"backend": "guidance"},
    }
    return made | ({} if size is None else {"kv_cache_memory_bytes": size}) | _length(node)


def _length(node: Vllm) -> dict[str, Any]:
    return {} if node.length is None else {"max_model_len": node.length}


def served(node: Vllm, files: Files, texts: Texts) -> VllmServed:
    """A server of our own, by `node.python`, on the loopback with a key that nobody else has.

    Raises:
        ResourceError: it does not start.
    """
    key, port = secrets.token_urlsafe(24), free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as said:  # the server has it open for longer
        process = subprocess.Popen(
            command(node, files, port),
            env=os.environ | {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"},
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
        )
        try:
            _wait(process, f"{url}/health", said, node.timeout)
        except BaseException:
            _end(process)
            raise
    manners = Manners(f"{url}/v1", key, node.sequences, node.tries, node.timeout)
    return VllmServed(manners, str(files.folder), texts, end=partial(_end, process))


def command(node: Vllm, files: Files, port: int) -> list[str]:
    """The server's command line."""
    made = [node.python, "-c", SERVER, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in settings(node, files, _on_cpu(node.python)).items():
        made += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return made


def _on_cpu(python: str) -> bool:
    """
    Raises:
        ResourceError: this interpreter has no vLLM.
    """
    ask = "from vllm.platforms import current_platform as p; print('cpu' if p.is_cpu() else 'other')"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as cause:
        said = getattr(cause, "stderr", "") or str(cause)
        what = f"{python} has no vLLM that can be imported ({one_line(said.strip()[-200:])})"
        raise ResourceError(what, fix="install vllm in that environment", key="generator.python") from cause
    return done.stdout.split()[-1:] == ["cpu"]


def _wait(process: subprocess.Popen[bytes], url: str, said: IO[bytes], most: float) -> None:
    last = time.monotonic() + most
    while process.poll() is None and time.monotonic() < last:
        try:
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(PAUSE)
    running = process.poll() is None
    how = f"did not start in {most:g} s" if running else f"ended with {process.returncode}"
    what = f"vLLM's server {how}: {_last(said, '' if running else 'Error')}"
    raise ResourceError(what, fix="see that; memory, size, length and timeout bound it", key="generator")


def _last(said: IO[bytes], word: str) -> str:
    """The last line with `word` in it, or the last."""
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()
    named = [line for line in lines if word in line and "WARNING" not in line]
    return one_line((named or lines or ["it wrote nothing"])[-1])[-300:]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
