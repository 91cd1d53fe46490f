"""`LLM(adapters=...)`: folders by name, asked for in one list beside the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig

from llmkit.build.llm import LLM
from llmkit.core.errors import ModelError, RecipeError
from llmkit.inference.request import RequestError
from llmkit.inference.sampling import Sampling
from tests.build.test_adapters_of import folder

HOW = Sampling(max_tokens=6, seed=3, ignore_eos=True, logprobs=0)
PROMPTS = ["hello world", "the quick brown fox"]


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    lora = folder(tiny, root / "lora", LoraConfig(r=4, target_modules=["o_proj", "down_proj"]))
    soft = folder(tiny, root / "soft", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    return {"lora": lora, "soft": soft}


@pytest.fixture(scope="module")
def llm(tiny: Any, folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(str(tiny), adapters=folders) as made:
        yield made


def probabilities(said: Any) -> list[float]:
    return [token.logprob for one in said for token in one.logprobs]


def test_a_name_gives_what_the_adapter_s_own_folder_gives(llm: LLM, folders: dict[str, Path]) -> None:
    found = {name: llm.generate(PROMPTS, HOW, adapter=name) for name in ("", *folders)}
    assert len({tuple(probabilities(said)) for said in found.values()}) == 3
    for name, path in folders.items():
        with LLM(str(path)) as alone:
            assert probabilities(alone.generate(PROMPTS, HOW)) == probabilities(found[name])


def test_it_is_heard_in_a_conversation_and_in_pieces(llm: LLM) -> None:
    asked = [{"role": "user", "content": "hi"}]
    said = {name: llm.chat(asked, HOW, adapter=name) for name in ("", "lora")}
    assert probabilities([said[""]]) != probabilities([said["lora"]])
    for name, whole in said.items():
        assert "".join(piece.text for piece in llm.stream(asked, HOW, adapter=name)) == whole.text


def test_names_and_folders_that_are_none_are_refused(
    llm: LLM, tiny: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RequestError, match=f"no adapter is named 'x'; fix: name one of {', '.join(sorted(folders))}"):
        llm.generate(PROMPTS, HOW, adapter="x")
    with pytest.raises(ModelError):
        LLM(str(tiny), adapters={"x": tiny})
    with (
        monkeypatch.context() as patch,
        pytest.raises(ModelError, match="adapters.x: /nope is no folder that there is"),
    ):
        patch.setattr("llmkit.build.spread.load", lambda *given: pytest.fail("the model was loaded before"))
        LLM(str(tiny), adapters={"x": "/nope"})
    with pytest.raises(RecipeError, match="generator transformers knows no adapters by name"):
        LLM(str(tiny), adapters=folders, generator="transformers")
