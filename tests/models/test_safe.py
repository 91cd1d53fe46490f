"""Files that must not be loaded: the M rows, each with its control."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch

from llmkit.core.errors import ModelError
from llmkit.models import fetch
from llmkit.models.export import export
from llmkit.models.load import How, load
from llmkit.models.node import ModelRef
from llmkit.models.resolve import resolve
from llmkit.models.safe import check_folder, read_header


def tensor_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def item(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_sound_header_is_read(tmp_path):
    path = tensor_file(tmp_path / "x.safetensors", {"a": item(0, 4), "b": item(4, 12, (2,))}, b"\0" * 12)
    assert read_header(path)["b"]["shape"] == [2]


@pytest.mark.parametrize(
    ("header", "data", "length", "said"),
    [
        ({"a": item(0, 4)}, b"\0" * 4, 1 << 40, "says its header has"),
        ({"a": item(0, 4)}, b"\0" * 4, 200_000_000, "says its header has"),
        ({"a": item(0, 4), "b": item(2, 6)}, b"\0" * 6, None, "b begins at offset 2"),
        ({"a": item(0, 4), "b": item(8, 12)}, b"\0" * 12, None, "b begins at offset 8"),
        (b'{"a": %b, "a": %b}' % ((json.dumps(item(0, 4)).encode(),) * 2), b"\0" * 4, None, "names a twice"),
        ({"a": item(0, 4, (1 << 62, 1 << 62))}, b"\0" * 4, None, "a has shape"),
        ({"a": item(0, 4)}, b"\0" * 9, None, "end at offset 4"),
        ({"a": item(0, 4, dtype="F99")}, b"\0" * 4, None, "a has no dtype"),
        ({"a": item(-4, 0)}, b"", None, "a has shape"),
        ({"a": item(0, 4, (1.0,))}, b"\0" * 4, None, "a has shape"),
        (b"[" * 5000, b"", None, "not JSON"),
        (b"", b"", None, "says its header has"),
    ],
)
def test_m7_unsound_files_name_tensor_and_offset(header, data, length, said, tmp_path):
    path = tensor_file(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def opened(folder, **how):
    ref = ModelRef(name=str(folder))
    return load(resolve(ref), ref, How(**how))


def test_the_control_loads(folder):
    assert opened(folder).support.packed


def test_m1_pickled_weights_are_refused_and_never_run(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "pwned"),)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError, match="convert to safetensors"):
        opened(folder)
    assert not (folder / "pwned").exists()


def test_m2_an_unsafe_torch_is_refused_with_the_ids(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(ModelError, match="CVE-2025-32434, CVE-2026-24747"):
        opened(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "link.safetensors", "pipe.safetensors"]
)
def test_m4_an_index_that_leads_out_is_refused_without_a_hang(name, folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "x.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"no plain file|leads out of the folder"):
        check_folder(folder)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_m4_an_index_that_is_no_plain_file_is_refused_without_a_hang(kind, folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](index)
    with pytest.raises(ModelError, match=r"index\.json: is no plain file"):
        resolve(ModelRef(name=str(folder)))


def test_a_revision_of_what_has_none_is_an_error_and_not_passed_over(folder):
    with pytest.raises(ModelError, match=r"model\.revision: \S+ is a folder, which has none; fix: leave it out"):
        resolve(ModelRef(name=str(folder), revision="main"))
    with pytest.raises(ModelError, match=r"model\.revision: smollm2-135m-instruct-q4 is an alias, which pins its own"):
        resolve(ModelRef(name="smollm2-135m-instruct-q4", revision="main"))
    resolve(ModelRef(name=str(folder)))  # the control


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_model_of_the_hub_comes_at_the_revision_asked_for_and_its_commit_is_kept(revision, folder, monkeypatch):
    asked = []
    commit = folder.rename(folder.with_name("c0ffee"))
    monkeypatch.setattr(fetch, "fetch_hub", lambda *what: asked.append(what) or commit)
    found = resolve(ModelRef(name="smollm2-135m-instruct", revision=revision))
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", revision)]
    assert (found.source, found.revision) == ("hub:HuggingFaceTB/SmolLM2-135M-Instruct", "c0ffee")


def test_an_adapter_of_a_model_of_the_hub_names_it_as_the_hub_does(adapter, folder, tmp_path, monkeypatch, tokenizer):
    commit = shutil.copytree(folder, tmp_path / "c0ffee")
    asked = []
    monkeypatch.setattr(fetch, "fetch_hub", lambda *what: asked.append(what) or commit)
    export(opened(adapter).model, tokenizer, tmp_path / "out", resolve(ModelRef(name="smollm2-135m-instruct")))
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["base_model_name_or_path"], said["revision"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "c0ffee")
    assert resolve(ModelRef(name=str(tmp_path / "out"))).base.folder == commit
    assert asked[-1] == ("HuggingFaceTB/SmolLM2-135M-Instruct", "c0ffee")


def test_m8_a_missing_shard_and_a_missing_tensor_are_named(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    names = list(read_header(folder / "part.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    check_folder(folder)  # the control
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors") | {"more": "gone.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        check_folder(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "more"], "part.safetensors")}))
    with pytest.raises(ModelError, match=r"more is not in part\.safetensors"):
        check_folder(folder)


def test_m8_a_weight_that_the_files_lack_is_named_and_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        opened(folder)


def test_m8_a_weight_of_another_shape_or_without_a_place_is_named_and_not_passed_over(folder):
    from safetensors.torch import load_file, save_file

    held, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file(held | {name: held[name][1:].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight of shape \[48, 32\], not \[47, 32\]"
    ):
        opened(folder)
    more = {"model.layers.2.mlp.up_proj.weight": held[name].clone(), "v_head.weight": held[name].clone()}
    save_file(held | more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no place for model\.layers\.2\.mlp\.up_proj\.weight and 1 more"):
        opened(folder)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    opened(folder)  # the control


def test_m10_weights_that_are_not_finite_are_named_unless_allowed(folder):
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"][3] = float("nan")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN"):
        opened(folder)
    opened(folder, allow_nonfinite=True)


def test_m13_a_quantised_model_is_not_quantised_again(folder):
    from llmkit.models.node import Nf4

    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="drop quant"):
        opened(folder, quant=Nf4())


def test_code_of_a_folder_is_not_run_without_a_grant(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}))
    (folder / "evil.py").write_text(f"open({str(folder / 'pwned')!r}, 'w')\n")
    with pytest.raises(ModelError, match="--allow-code"):
        opened(folder)
    assert not (folder / "pwned").exists()


def test_an_unknown_family_and_a_model_of_another_kind_are_refused_by_name(folder):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"model_type": "nonsense"}))
    with pytest.raises(ModelError, match="nonsense"):
        opened(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="T5, not a causal language model"):
        opened(folder)


@pytest.fixture
def adapter(folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(opened(folder).model, LoraConfig(r=2, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_m11_an_adapter_that_does_not_fit_is_refused(adapter, folder):
    assert opened(adapter).model.peft_config  # the control
    settings = adapter / "adapter_config.json"
    change(settings, base_model_name_or_path="/nowhere/base")
    with pytest.raises(ModelError, match="its base /nowhere/base is not here"):
        opened(adapter)
    change(settings, base_model_name_or_path=str(folder), r=4)
    with pytest.raises(ModelError, match="does not fit its base"):
        opened(adapter)
    change(settings, r=2, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="has no place for"):
        opened(adapter)
    (adapter / "llmkit.json").write_text(json.dumps({"base": {"sha256": "0" * 64}}))
    with pytest.raises(ModelError, match="was trained on weights 000000000000"):
        opened(adapter)


def test_m5_a_template_that_is_called_a_path_is_not_written(folder, tmp_path, tokenizer):
    from llmkit.models.export import check_template_names

    class Named:
        chat_template = {"default": "x", "../../evil": "y"}

    with pytest.raises(ModelError, match=r"\.\./\.\./evil"):
        check_template_names(Named())
    check_template_names(tokenizer)
