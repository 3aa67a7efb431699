"""Load adapters from Python and from the command line: finished, plain, moved, damaged."""

import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import inference_example
from inference_example import load_generator
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.errors import UserError

PROMPT = "The river"


def test_settings_are_the_adapters_own_with_the_given_keys_changed(adapter, greedy):
    own = read_adapter(str(adapter)).config.generation
    changed = {"max_new_tokens": 12, "temperature": 0.0, "repetition_penalty": 1.0}
    assert greedy.settings == own.model_copy(update=changed) != own


def test_an_answer_and_its_stream_are_the_same_text(greedy):
    answer = greedy.answer(PROMPT)
    assert (answer.tokens, answer.stop) == (12, "length") and answer.seconds > 0 and answer.text
    assert "".join(greedy.stream(greedy.encode(PROMPT))) == answer.text == greedy.last.text
    assert greedy.complete([greedy.encode(PROMPT)])[0].text == answer.text


def test_a_merged_adapter_answers_the_same(adapter, greedy):
    merged = load_generator(str(adapter), device="cpu", merged=True, settings=greedy.settings, seed=7)
    assert (merged.fixed, merged.seed, merged.settings) == ("--merged", 7, greedy.settings)
    assert merged.answer(PROMPT).text == greedy.answer(PROMPT).text


@pytest.mark.parametrize("arguments, keys, words", [
    ({"settings": {"temperature": -1, "top_p": "wide"}}, ["generation.temperature", "generation.top_p"], "or keep 0.5"),
    ({"settings": {"temprature": 1}}, ["generation.temprature"], "did you mean"),
    ({"seed": -1}, ["--seed"], "whole number"),
    ({"device": "gpu"}, ["--device"], "auto, cuda or cpu"),
    ({"merged": True, "base_only": True}, ["--merged"], "cannot be combined with --base_only"),
    ({"system": "Be brief."}, ["--system"], "not trained on chats"),
    ({"adapter": "no-such-folder"}, ["--adapter"], "no-such-folder"),
])  # fmt: skip
def test_wrong_arguments_are_one_error(adapter, arguments, keys, words):
    with pytest.raises(UserError) as error:
        load_generator(**{"adapter": adapter, "device": "cpu"} | arguments)
    assert [problem.key for problem in error.value.problems] == keys
    assert words in str(error.value)


def test_base_only_leaves_the_adapter_out(adapter, greedy):
    base = load_generator(adapter, device="cpu", base_only=True, settings=greedy.settings)
    ids = torch.tensor([greedy.encode(PROMPT)])
    with torch.no_grad():
        assert (base.engine.model(ids).logits - greedy.engine.model(ids).logits).abs().max() > 0.1
    assert not hasattr(base.engine.model, "peft_config")
    assert base.answer(PROMPT).text != greedy.answer(PROMPT).text


def copy(adapter: Path, folder: Path, *leave_out: str) -> Path:
    return Path(shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoints", *leave_out)))


def test_a_plain_peft_adapter_loads_and_the_assumptions_are_printed(adapter, tmp_path, capsys, greedy, two_layers_dir):
    plain = copy(adapter, tmp_path / "plain", "run.json")
    generator = load_generator(plain, device="cpu", settings=greedy.settings)
    err = capsys.readouterr().err
    assert "no run.json" in err and str(two_layers_dir) in err and "NF4" in err
    assert generator.answer(PROMPT).text == greedy.answer(PROMPT).text


def test_without_run_json_the_runs_config_decides_the_quantization(adapter, tmp_path, capsys):
    plain = copy(adapter, tmp_path / "plain", "run.json")
    config = (plain / "config.yaml").read_text()
    assert "quant_type: nf4" in config
    (plain / "config.yaml").write_text(config.replace("quant_type: nf4", "quant_type: fp4"))
    generator = load_generator(plain, device="cpu")
    packed = [module.weight for module in generator.engine.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert packed and {weight.quant_type for weight in packed} == {"fp4"}
    err = capsys.readouterr().err
    assert "FP4" in err and "NF4" not in err


@pytest.mark.parametrize("trained_in", ["float16", "bfloat16"])
def test_an_adapter_trained_on_a_gpu_answers_on_a_cpu(adapter, tmp_path, trained_in):
    """A dtype of training that this machine cannot compute in is replaced, not refused."""
    folder = copy(adapter, tmp_path / "moved")
    provenance = json.loads((folder / "run.json").read_text())
    provenance["quantization"]["compute_dtype"] = trained_in
    (folder / "run.json").write_text(json.dumps(provenance))
    generator = load_generator(folder, device="cpu", settings={"max_new_tokens": 12})
    dtype = {"float16": torch.float32, "bfloat16": torch.bfloat16}[trained_in]
    assert generator.engine.model.get_input_embeddings().weight.dtype == dtype
    assert generator.answer(PROMPT).tokens == 12


def test_the_base_model_is_found_from_another_working_folder(adapter, tmp_path, monkeypatch, tiny_dir):
    folder = copy(adapter, tmp_path / "adapter")
    provenance = json.loads((folder / "run.json").read_text())
    provenance["base_model"] |= {"name": "assets/tiny-qwen2", "folder": str(tiny_dir)}
    (folder / "run.json").write_text(json.dumps(provenance))
    monkeypatch.chdir(tmp_path)
    assert read_adapter(str(folder)).model.name == str(tiny_dir)


@pytest.mark.parametrize("prepare, words", [
    (lambda adapter, folder: None, ["does not exist", "train_qlora.py"]),
    (lambda adapter, folder: folder.mkdir(), ["adapter_model.safetensors", "train_qlora.py"]),
    (lambda adapter, folder: shutil.copytree(adapter / "checkpoints", folder / "checkpoints"), ["--resume", "checkpoint-4"]),
    (lambda adapter, folder: shutil.copytree(adapter / "checkpoints", folder), ["Use ", "checkpoint-4"]),
    (lambda adapter, folder: shutil.copytree("assets/tiny-qwen2", folder), ["whole model", "folder of an adapter"]),
    (lambda adapter, folder: folder.write_text("{}"), ["a file", "--adapter"]),
    (lambda adapter, folder: copy(adapter, folder, "adapter_config.json"), ["adapter_config.json"]),
    (lambda adapter, folder: (copy(adapter, folder) / "run.json").write_text("{"), ["run.json", "JSON"]),
    (lambda adapter, folder: (copy(adapter, folder) / "run.json").write_text("{}"), ["run.json", "base_model"]),
    (lambda adapter, folder: (copy(adapter, folder) / "adapter_model.safetensors").write_bytes(b"half"), ["damaged"]),
])  # fmt: skip
def test_a_folder_without_a_complete_adapter_is_one_line(adapter, tmp_path, prepare, words):
    folder = tmp_path / "adapter"
    prepare(adapter, folder)
    with pytest.raises(UserError) as error:
        inference_example.main(["--mode", "text", "--adapter", str(folder), "--device", "cpu", "--prompt", PROMPT])
    (problem,) = error.value.lines
    assert str(folder) in problem and "\n" not in problem
    for word in words:
        assert word in problem


def test_an_adapter_of_another_model_is_one_line(adapter, tmp_path):
    folder = copy(adapter, tmp_path / "adapter", "run.json")
    other = tmp_path / "other-model"
    shutil.copytree("assets/tiny-qwen2", other)
    config = json.loads((other / "config.json").read_text())
    small = Qwen2Config(
        **config | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64}
    )
    AutoModelForCausalLM.from_config(small).save_pretrained(other)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(other)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not fit") as error:
        load_generator(folder, device="cpu")
    assert "\n" not in error.value.lines[0] and str(other) in error.value.lines[0]


def test_a_missing_gpu_is_named_by_the_flag(adapter):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=r"--device: cuda: needs a GPU.* or use auto"):
        inference_example.main(["--adapter", str(adapter), "--prompt", "x", "--device", "cuda"])


@pytest.mark.parametrize("flags", [
    ["--prompt", "word " * 1100], ["--mode", "demo", "--max_new_tokens", "1020"],
])  # fmt: skip
def test_a_prompt_that_is_too_long_is_refused_before_weights_are_loaded(adapter, root, tmp_path, flags):
    folder, base = copy(adapter, tmp_path / "adapter"), tmp_path / "base"
    shutil.copytree(root / "assets" / "tiny-qwen2", base, ignore=shutil.ignore_patterns("*.safetensors"))
    provenance = json.loads((folder / "run.json").read_text())
    provenance["base_model"] = {"name": str(base), "revision": None, "folder": str(base)}
    (folder / "run.json").write_text(json.dumps(provenance))
    with pytest.raises(UserError, match=r"--prompt: 1.* context of 1024|--mode: demo, prompt .* context of 1024"):
        inference_example.main(["--adapter", str(folder), *flags])
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        inference_example.main(["--adapter", str(folder), "--prompt", "short"])
