"""Models that must not be loaded, beyond what tests/models/test_safe.py holds."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmkit
from llmkit.adapters.node import Lora
from llmkit.core.errors import ModelError, RecipeError, ResourceError
from llmkit.core.memory import out_of_memory_named
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef, Nf4
from llmkit.models.resolve import resolve
from tests.conftest import make_model, make_tokenizer
from tests.faults import go, in_child, sft


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def adapter(folder, tmp_path):
    model = Lora(rank=2).attach(make_model())
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(folder, **how):
    ref = ModelRef(name=str(folder))
    return load(resolve(ref), ref, How(**how))


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_m1_a_pickled_adapter_is_refused_and_never_run(adapter, tmp_path):
    assert opened(adapter).model.peft_config  # the control
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(ModelError, match="convert to safetensors"):
        opened(adapter)
    assert not (tmp_path / "pwned").exists()
    pickle.loads((adapter / "adapter_model.bin").read_bytes())
    assert (tmp_path / "pwned").exists()  # the payload works


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "pytorch_model.bin"])
def test_m1_every_pickled_kind_is_named(name, folder):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"holds pickled weights \({name}\)"):
        resolve(ModelRef(name=str(folder)))


def test_m2_pickles_beside_sound_weights_are_never_opened(adapter, folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for place in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / place).write_bytes(b"\x80\x04.")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    for name in ("torch.load", "torch.serialization.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    opened(adapter)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AssertionError, match="a pickle was read"):  # the control: the trap is where torch reads
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)


@pytest.mark.parametrize(
    ("version", "safe"), [("2.9.1", False), ("1.13.1+cu117", False), ("2.10.0", True), ("3.0.0a0+git1", True)]
)
def test_m2_the_floor_of_torch_is_a_number_and_not_a_text(version, safe, folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert opened(folder)
        return
    with pytest.raises(ModelError, match="CVE-2025-32434, CVE-2026-24747"):
        opened(folder)


@pytest.mark.parametrize("kind", ["absolute", "relative", "fifo", "folder", "dangling"])
def test_m4_the_one_weight_file_may_not_lead_out_either(kind, folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    make = {
        "absolute": lambda: weights.symlink_to(tmp_path / "elsewhere.safetensors"),
        "relative": lambda: weights.symlink_to("../elsewhere.safetensors"),
        "fifo": lambda: os.mkfifo(weights),
        "folder": weights.mkdir,
        "dangling": lambda: weights.symlink_to("nothing"),
    }
    make[kind]()
    with pytest.raises(ModelError, match="leads out of the folder|no plain file|is missing"):
        resolve(ModelRef(name=str(folder)))


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/abs", "..", ""])
def test_m5_a_template_named_by_a_path_is_written_nowhere(name, tiny, tmp_path):
    from llmkit.models.export import export

    tokenizer = make_tokenizer({"default": "{{ messages }}", name: "pwned"})
    made, base = tmp_path / "a" / "b" / "model", resolve(ModelRef(name=str(tiny)))
    with pytest.raises(ModelError, match="a chat template is called"):
        export(make_model(), tokenizer, made, base)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    export(make_model(), make_tokenizer({"default": "{{ messages }}", "plain": "x"}), made, base)  # the control
    assert (made / "model.safetensors").is_file()


def test_m8_a_cut_file_is_named_before_anything_is_loaded(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: .* offset"):
        resolve(ModelRef(name=str(folder)))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_m8_a_fetched_model_is_checked_against_its_seal(harm, folder):
    from llmkit.models.fetch import _seal, check_seal

    _seal(folder, "test", "0", "none")
    digest = check_seal(folder)
    assert check_seal(folder) == digest  # by its stamp
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(raw if harm == "flip" else raw[:-1])
    with pytest.raises(ModelError, match=rf"model\.safetensors: is {'missing' if harm == 'remove' else 'damaged'}"):
        check_seal(folder)


def test_m8_a_base_that_changed_since_the_run_began_is_named_before_the_next_step(folder, rows, tmp_path):
    node, out = sft(folder, rows, tmp_path / "run", steps=2), tmp_path / "run"
    go(node)
    said = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(said | {"state": "running"}))
    before = (out / "metrics.jsonl").read_bytes()
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RecipeError, match=r"model\.sha256: was \w+"):
        go(node)
    assert (out / "metrics.jsonl").read_bytes() == before
    raw[-3] ^= 1
    path.write_bytes(raw)
    go(node)  # the control


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_m10_one_weight_of_any_type_is_found(value, folder):
    from safetensors.torch import load_file, save_file

    held = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    opened(folder)  # the control
    held["model.layers.0.self_attn.q_proj.weight"][3, 5] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds NaN or infinity"):
        opened(folder)


def test_m11_an_adapter_whose_base_is_somewhere_on_the_hub_downloads_nothing(adapter, tmp_path):
    settings = adapter / "adapter_config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps(said | {"base_model_name_or_path": "someone/else"}))
    seen = tmp_path / "seen"

    def work():
        from huggingface_hub import constants

        from llmkit.cli.main import _guarded

        os.environ.pop("HF_HUB_OFFLINE")
        sys.addaudithook(lambda event, args: seen.touch() if event == "socket.getaddrinfo" else None)
        code = _guarded(["generate", str(adapter), "hi"], False)
        os._exit(code if os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE else 99)

    assert in_child(work) == 4 and not seen.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": ["c_attn"]}, r"does not fit its base: .*c_attn"),
        ({"r": 7}, r"q_proj\.lora_A\S* has shape \[2, 32\], and its settings and base make it \[7, 32\]"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            r"has no place for \S*(k_proj|o_proj|gate_proj|up_proj|down_proj)\S*",
        ),
        ({"base_model_name_or_path": "../model/../elsewhere"}, r"its base \.\./model/\.\./elsewhere is not here"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": 7}, "names no base"),
    ],
)
def test_m11_an_adapters_settings_that_fit_neither_base_nor_weights_are_named(change, said, adapter):
    assert opened(adapter).model.peft_config  # the control
    settings = adapter / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    with pytest.raises(ModelError, match=said) as caught:
        opened(adapter)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [{"hidden_size": 64}, {"num_hidden_layers": 1}])
def test_m11_an_adapter_of_another_base_is_refused_with_what_was_expected_and_found(other, adapter, folder):
    make_model(**other).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"has shape \[2, 32\], .* make it \[2, 64\]|has no place for") as caught:
        opened(adapter)
    assert "\n" not in str(caught.value)


def test_m13_bits_without_their_library_name_the_setting(folder, monkeypatch):
    opened(folder, quant=Nf4())  # the control
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"quant\.kind: quant needs bitsandbytes"):
        opened(folder, quant=Nf4())


SHORT = (
    "unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)",
    "DefaultCPUAllocator: can't allocate memory",
)


@pytest.mark.parametrize("said", [*SHORT, "CUDA out of memory. Tried to allocate 2.00 GiB"])
@pytest.mark.parametrize(
    "place",
    [
        "transformers.AutoModelForCausalLM.from_pretrained",  # weights
        "transformers.LlamaModel.forward",  # the probe
        "peft.PeftModel.from_pretrained",  # an adapter
        "transformers.AutoTokenizer.from_pretrained",
    ],
)
def test_t2_memory_that_gives_out_while_a_model_loads_is_called_that(place, said, adapter, monkeypatch):
    seen = []

    def fails(*args, **kwargs):
        seen.append(place)
        raise RuntimeError(said) if "Tokenizer" not in place else OSError(said)

    opened(adapter)  # the control
    monkeypatch.setattr(place, fails)
    told = pytest.raises(ResourceError, match=r"memory gave out \(.*MiB are free\); fix: take less")
    with told, out_of_memory_named("cpu", "take less"):
        opened(adapter)
    assert seen


def test_t2_what_is_no_lack_of_memory_is_not_called_that():
    for other in (RuntimeError("size mismatch"), ModelError("a model named out of memory")):
        with pytest.raises(type(other)), out_of_memory_named("cpu", "take less"):
            raise other


BATTERY = """
import json, os, pathlib, struct, sys
from llmkit.core.errors import ModelError
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve

def item(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

def weights(folder, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<Q", len(raw) if length is None else length)
    (folder / "model.safetensors").write_bytes(head + raw + data)

def index(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

CASES = {
    "sound": lambda f: weights(f, {"a": item(0, 4)}, bytes(4)),
    "no weights": lambda f: None,
    "pickle": lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
    "traversal": lambda f: index(f, "../x.safetensors"),
    "missing": lambda f: index(f, "x.safetensors"),
    "fifo": lambda f: (os.mkfifo(f / "x.safetensors"), index(f, "x.safetensors")),
    "long header": lambda f: weights(f, {"a": item(0, 4)}, bytes(4), 1 << 40),
    "overlap": lambda f: weights(f, {"a": item(0, 4), "b": item(2, 6)}, bytes(6)),
    "hole": lambda f: weights(f, {"a": item(0, 4), "b": item(8, 12)}, bytes(12)),
    "twice": lambda f: weights(f, b'{"a": 1, "a": 1}'),
    "overflow": lambda f: weights(f, {"a": item(0, 4, (1 << 62, 1 << 62))}, bytes(4)),
    "trailing": lambda f: weights(f, {"a": item(0, 4)}, bytes(9)),
    "deep": lambda f: weights(f, b"[" * 5000),
}
for number, (name, make) in enumerate(CASES.items()):
    folder = pathlib.Path(str(number))
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    make(folder)
    try:
        resolve(ModelRef(name=str(folder)))
        print(name, "is sound")
    except ModelError as error:
        print(name, error)
print("asserts", __debug__, file=sys.stderr)
"""


def test_m14_no_assert_stands_in_what_is_shipped():
    for path in Path(llmkit.__file__).parent.rglob("*.py"):
        found = [part.lineno for part in ast.walk(ast.parse(path.read_text())) if isinstance(part, ast.Assert)]
        assert not found, f"{path}:{found}"


ROWS = """
import pathlib, sys
from llmkit.core.errors import DataError
from llmkit.data.jsonl import read_jsonl
from llmkit.data.rows import Raw, Unusable, bounded
from llmkit.data.shapes import shaped

good = '{"prompt": "a", "completion": "b"}'
texts = [good, good + good, good + ",", "[" + good + "]", "{", "'a'", "7", good[:9], '{"text": ""}', "{'a': 1}"]
texts += ['{"messages": [{}]}', '{"tools": ' + "[" * 99 + "]" * 99 + "}", '{"text": ' + "9" * 9999 + "}"]
texts += ["{\\x00", "\ufeff" + good]
for text in texts:
    for end in ("", "\\n"):
        pathlib.Path("rows").write_text(text + end)
        for row in read_jsonl(pathlib.Path("rows")):
            row = bounded(row) if isinstance(row, Raw) else row
            try:
                print(row if isinstance(row, DataError) else shaped(row.values, 0))
            except Unusable as why:
                print("unusable:", why)
print("asserts", __debug__, file=sys.stderr)
"""


def test_m14_rows_are_judged_alike_without_asserts(tmp_path):
    said = []
    for level in ("0", "2"):
        env = {**os.environ, "PYTHONOPTIMIZE": level}
        command = [sys.executable, "-c", ROWS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
        assert done.stderr == f"asserts {level == '0'}\n"
        said.append(done.stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 30 and said[0].count("Row(") == 4


def test_m14_what_is_refused_without_asserts_is_the_same(tmp_path):
    said = []
    for level in ("0", "2"):
        (tmp_path / level).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", BATTERY],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path / level,
            env={**os.environ, "PYTHONOPTIMIZE": level},
        )
        assert done.stderr == f"asserts {level == '0'}\n"  # the fault took effect
        said.append(done.stdout)
    lines = said[0].splitlines()
    assert said[0] == said[1] and len(lines) == 13
    assert [line for line in lines if line.endswith("is sound")] == ["sound is sound"]
