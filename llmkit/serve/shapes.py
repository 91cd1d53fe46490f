"""What requests may hold: the routes read these fields, and the server's own document tells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.serve import described as say
from llmkit.serve.kinds import Choice, Flag, Free, Ids, Number, Text, Texts, Whole, object_of, shaped
from llmkit.serve.node import Bounds

LARGEST = 2**63 - 1
MANY = 1 << 31
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "verbosity",
)
"""What OpenAI's clients send and nothing follows from here; `user` is the unit of the request's record, and
`metadata.category` what answers are counted by."""


@dataclass(frozen=True)
class Sampled:
    """How the next token is chosen; chat and completions have the same."""

    temperature: float = shaped(Number(0.0, 2.0, 1.0))
    top_p: float = shaped(Number(0.0, 1.0, 1.0))
    top_k: int = shaped(Whole(-1, 1 << 20, 0))
    min_p: float = shaped(Number(0.0, 1.0, 0.0))
    n: int = shaped(Whole(1, "n", 1))
    presence_penalty: float = shaped(Number(-2.0, 2.0, 0.0))
    frequency_penalty: float = shaped(Number(-2.0, 2.0, 0.0))
    repetition_penalty: float = shaped(Number(0.01, 10.0, 1.0))
    stop: tuple[str, ...] = shaped(Texts(16, letters=1000))
    stop_token_ids: tuple[int, ...] = shaped(Ids(64))
    allowed_token_ids: tuple[int, ...] = shaped(Ids(1 << 16))
    bad_words: tuple[str, ...] = shaped(Texts(64))
    ignore_eos: bool = shaped(Flag())
    min_tokens: int = shaped(Whole(0, MANY, 0))
    logit_bias: Any = shaped(Free(say.BIAS))
    seed: int | None = shaped(Whole(-LARGEST - 1, LARGEST))
    response_format: Any = shaped(Free(say.FORMAT))
    structured_outputs: Any = shaped(Free(say.STRUCTURED))
    speculation: Any = shaped(Free(say.SPECULATION))


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is told."""

    include_usage: bool = shaped(Flag())


STREAM_IGNORED = ("include_obfuscation",)


@dataclass(frozen=True)
class Common:
    """Who asks what, and how it is told; chat and completions have the same."""

    model: str = shaped(Text())
    user: str = shaped(Text())
    stream: bool = shaped(Flag())
    stream_options: Any = shaped(Free(object_of(StreamOptions, bounds=Bounds(), ignored=STREAM_IGNORED)))
    deadline: float | None = shaped(Number(0.0, 86_400.0))
    metadata: Any = shaped(Free(say.METADATA))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str = shaped(Choice(say.ROLES))
    content: Any = shaped(Free(say.CONTENT))
    tool_calls: Any = shaped(Free(say.CALLS))
    name: str = shaped(Text())
    tool_call_id: str = shaped(Text())
    reasoning_content: str = shaped(Text())


MESSAGE_IGNORED = ("refusal", "annotations", "audio", "function_call")
MESSAGES = say.listed(
    object_of(Message, bounds=Bounds(), ignored=MESSAGE_IGNORED, required=("role",)), say.MOST_MESSAGES, 1
)


@dataclass(frozen=True)
class Conversation:
    """What chat has beside that."""

    messages: Any = shaped(Free(MESSAGES))
    tools: Any = shaped(Free(say.TOOLS))
    tool_choice: Any = shaped(Free(say.TOOL_CHOICE))
    parallel_tool_calls: bool = shaped(Flag(True))
    max_completion_tokens: int | None = shaped(Whole(1, MANY))
    max_tokens: int | None = shaped(Whole(1, MANY))
    logprobs: bool = shaped(Flag())
    top_logprobs: int = shaped(Whole(0, "logprobs", 0))
    add_generation_prompt: bool | None = shaped(Flag(None))
    continue_final_message: bool = shaped(Flag())
    """The answer goes on with the last message, which is an assistant's, as vLLM and transformers call it."""
    prediction: Any = shaped(Free(say.PREDICTION))


@dataclass(frozen=True)
class Prompted:
    """What completions have beside that."""

    prompt: Any = shaped(Free(say.PROMPT))
    suffix: str = shaped(Text(letters=0))
    echo: bool = shaped(Flag())
    logprobs: int | None = shaped(Whole(0, "logprobs"))
    max_tokens: int | None = shaped(Whole(0, MANY))
    best_of: int | None = shaped(Whole(1, "n"))


@dataclass(frozen=True)
class Responding:
    """What `/v1/responses` calls otherwise than chat; the rest of it is in `SAME`."""

    input: Any = shaped(Free(say.INPUT))
    instructions: str = shaped(Text())
    max_output_tokens: Any = shaped(Whole(1, MANY))
    text: Any = shaped(Free(say.FLAT_FORMAT))
    tools: Any = shaped(Free(say.FLAT_TOOLS))
    tool_choice: Any = shaped(Free(say.FLAT_CHOICE))
    store: bool = shaped(Flag())
    background: bool = shaped(Flag())
    previous_response_id: Any = shaped(Free({"type": "null"}))
    conversation: Any = shaped(Free({"type": "null"}))


SAME = (
    *("model", "temperature", "top_p", "stream", "user", "parallel_tool_calls", "top_logprobs", "deadline", "seed"),
    *("metadata", "speculation"),
)
"""Fields of `/v1/responses` that are those of chat."""
RESPONSES_IGNORED = (
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "truncation",
    "reasoning",
    "include",
    "stream_options",
)


@dataclass(frozen=True)
class Embedding:
    """`/v1/embeddings`."""

    model: str = shaped(Text())
    input: Any = shaped(Free(say.PROMPT))
    encoding_format: str = shaped(Choice(("float", "base64"), "float"))
    pooling: str = shaped(Choice(("mean", "last"), "mean"))


@dataclass(frozen=True)
class Tokenizing:
    """`/tokenize`."""

    model: str = shaped(Text())
    prompt: Any = shaped(Free(say.STRING))
    content: Any = shaped(Free(say.STRING))
    messages: Any = shaped(Free(MESSAGES))
    tools: Any = shaped(Free(say.TOOLS))
    add_special_tokens: bool | None = shaped(Flag(None))
    add_special: bool = shaped(Flag(True))
    """What llama.cpp calls it; the name of vLLM goes before it."""
    add_generation_prompt: bool | None = shaped(Flag(None))
    continue_final_message: bool = shaped(Flag())
    return_token_strs: bool = shaped(Flag())
    with_pieces: bool = shaped(Flag())


@dataclass(frozen=True)
class Detokenizing:
    """`/detokenize`."""

    model: str = shaped(Text())
    tokens: tuple[int, ...] = shaped(Ids("body"))


@dataclass(frozen=True)
class LoadAdapter:
    """`/v1/load_lora_adapter`."""

    lora_name: str = shaped(Text())
    lora_path: str = shaped(Text())
    tenant: str = shaped(Text())


LOAD_IGNORED = ("load_inplace",)


@dataclass(frozen=True)
class UnloadAdapter:
    """`/v1/unload_lora_adapter`."""

    lora_name: str = shaped(Text())


UNLOAD_IGNORED = ("lora_int_id",)


@dataclass(frozen=True)
class NewWeights:
    """`/admin/weights`."""

    path: str = shaped(Text())
