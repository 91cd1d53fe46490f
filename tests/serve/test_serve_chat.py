"""Chat and completions through the `openai` client: the same text as the model in process, streamed and whole."""

import pytest

from llmkit.inference.sampling import Sampling

ASKED = [{"role": "user", "content": "hello world"}]


def test_a_stream_is_the_whole_answer_in_parts(client, llm):
    whole = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=12, temperature=0)
    said, usage, finish = "", None, None
    stream = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    for part in stream:
        usage = part.usage or usage
        for choice in part.choices:
            said += choice.delta.content or ""
            finish = choice.finish_reason or finish
    ids = llm.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    own = llm.generate([ids], Sampling(max_tokens=12))[0]
    assert whole.choices[0].message.content == said == own.text and said
    assert finish == whole.choices[0].finish_reason == own.finish_reason
    assert usage.prompt_tokens == whole.usage.prompt_tokens == len(ids)
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert whole.id.startswith("chatcmpl-") and whole.model == "tiny"


def test_completions_of_several_prompts_with_their_echo_and_log_probabilities(client, llm):
    made = client.completions.create(
        model="tiny", prompt=["hello world", "a model"], max_tokens=4, temperature=0, n=2, echo=True, logprobs=2
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(made.choices, ["hello world"] * 2 + ["a model"] * 2, strict=True):
        own = llm.generate([prompt], Sampling(max_tokens=4, logprobs=2, prompt_logprobs=2))[0]
        assert choice.text == prompt + own.text
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text
        assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
        wanted = [None, *(token.logprob for token in own.prompt_logprobs[1:]), *(t.logprob for t in own.logprobs)]
        assert told.token_logprobs[0] is None and told.token_logprobs[1:] == pytest.approx(wanted[1:], abs=1e-5)
    assert made.usage.completion_tokens == sum(4 for _ in made.choices)


def test_a_seed_repeats_and_others_differ(client):
    def said(**more):
        made = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=16, n=3, **more)
        return [choice.message.content for choice in made.choices]

    assert said(seed=5) == said(seed=5)
    assert len(set(said(seed=5))) == 3 and said() != said()


def test_models_are_listed_and_others_are_not_found(client):
    from openai import NotFoundError

    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for call in (
        lambda: client.models.retrieve("other"),
        lambda: client.chat.completions.create(model="other", messages=ASKED),
    ):
        with pytest.raises(NotFoundError) as refused:
            call()
        assert refused.value.code == "model_not_found" and refused.value.param == "model"
