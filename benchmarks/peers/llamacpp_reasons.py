"""Why an assertion of llama.cpp's server tests does not hold against ours.

Each: whether what the test is about is private to that server (else one assertion of several), why, and what the test's
name, the assertion and the cause match, as `name: line: assertion (cause)`.
"""

from __future__ import annotations

TEXT = "text or count of its own model and tokenizer"
ROUTE = "route of that server alone (`/props`, `/slots`, `/apply-template`, `.../input_tokens`)"
FIELD = "field of that server alone (`timings`, `__verbose`, `prompt_progress`, `generation_settings`, ...)"
START = "start-up setting of that server alone (several addresses, aliases, tags, split files)"
PRIVATE_STARTS = "^test_(server_multiple_addresses|server_model_aliases_and_tags)"
PRIVATE_ROUTES = (
    r"^test_(server_props|server_slots|apply_chat_template|chat_completions_token_count|cancel_request)"
    r"|check_slots_status"
)
PRIVATE_FIELDS = (
    r"^test_(chat_template|chat_completion_with_timings|return_progress|verbose_debug|n_probs|completion_response_fields)"
    r"|^test_completion_prompt_cache"
)

REASONS = (
    (True, START, PRIVATE_STARTS),
    (True, ROUTE, PRIVATE_ROUTES),
    (True, "log-probabilities and other answers of `/completion` in shapes of its own", "^test_n_probs"),
    (
        True,
        "one prompt of text and tokens, or an object: not OpenAI's interface",
        r"^test_json_prompt|^test_embedding_content",
    ),
    (True, "one prompt of text and tokens, or an object: not OpenAI's interface", r"mixed_input\[input(3|7|8|9|10)"),
    (
        False,
        "one prompt of text and tokens, or an object: not OpenAI's interface",
        r"^test_completion_with_tokens_input: 3",
    ),
    (True, "its own grammars (GBNF); ours are asked for as `structured_outputs`", "^test_completion_with_grammar"),
    (True, "words, not tokens, as keys of `logit_bias`", r"^test_logit_bias\[False"),
    (True, "vectors of each token (`pooling: none`)", "^test_embedding_pooling_none"),
    (True, "two assistant turns in a row: ours leaves them to the template", "^test_invalid_chat_completion_req"),
    (False, "a fingerprint that begins with `b` and its build", "system_fingerprint"),
    (
        False,
        "the first part's content is null; ours is OpenAI's empty text",
        r"\.content is None|\"content\"\] is None",
    ),
    (
        False,
        "type and numbers of its own in an error (ours has OpenAI's `context_length_exceeded`)",
        "exceed_context|n_ctx",
    ),
    (
        False,
        "type and numbers of its own in an error (ours has OpenAI's `context_length_exceeded`)",
        "n_prompt_tok|too large",
    ),
    (True, FIELD, PRIVATE_FIELDS),
    (False, FIELD, r"timings|truncated|has_new_line|generation_settings|\"tokens\"\]|__verbose|prompt_progress"),
    (False, TEXT, r"match_regex|== n_prompt|== n_cache|== n_tokens|== 2 \* 9|== bosId"),
)
