"""Load adapters whose folders are whole, incomplete, damaged or from another model: each mistake is one line."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import inference_example
from qlora_kit.adapter import patterns, peft_settings
from qlora_kit.adapter.attach import adapter_norm
from qlora_kit.adapter.folder import read_adapter
from qlora_kit.adapter.lora_pairs import read_pairs
from qlora_kit.adapter.switchable import SwitchableAdapter
from qlora_kit.config import GenerationSettings
from qlora_kit.data.chat_template import find_stop_ids
from qlora_kit.errors import UserError
from qlora_kit.inference.generator import Generator
from qlora_kit.model.fingerprint import weights_fingerprint
from qlora_kit.output.provenance import write_provenance

GREEDY = GenerationSettings(max_new_tokens=8, temperature=0.0, repetition_penalty=1.0)


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture
def folder(adapter, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def load(folder: Path, system: str | None = None) -> Generator:
    return inference_example.load_generator(folder, device="cpu", settings=GREEDY, system=system)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load(folder)
    (problem,) = error.value.lines
    assert str(folder) in problem and "\n" not in problem
    return problem


def change_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_norm_is_that_of_the_updates_as_full_matrices(adapter):
    model = load(adapter).engine.model
    updates = [module.get_delta_weight("default") for module in model.modules() if hasattr(module, "lora_A")]
    norm, projections = adapter_norm(model)
    assert projections == len(updates) == 2 * 7  # layers, projections of each
    assert norm == pytest.approx(math.sqrt(sum(update.double().square().sum().item() for update in updates)), rel=1e-5)
    assert norm > 0


def test_a_missing_tensor_is_refused(folder):
    names = []
    change_weights(folder, lambda weights: [names.append(name) or weights.pop(name) for name in sorted(weights)[:3]])
    problem = refusal(folder)
    assert "lacks 3 tensors of" in problem and names[0].removeprefix("base_model.model.") in problem and "and 1 more" in problem


def test_an_unknown_tensor_is_refused(folder):
    def add(weights):
        weights["base_model.model.model.layers.99.mlp.up_proj.lora_A.weight"] = torch.zeros(16, 192)

    change_weights(folder, add)
    problem = refusal(folder)
    assert "has 1 tensor unknown" in problem and "layers.99.mlp.up_proj.lora_A" in problem


def test_matrices_of_another_rank_are_refused(folder):
    change_json(folder / "adapter_config.json", r=8)
    assert "does not fit" in refusal(folder)


@pytest.mark.parametrize("number", [math.nan, 1e30])
def test_nan_and_numbers_that_overflow_are_refused(folder, number):
    change_weights(folder, lambda weights: weights[sorted(weights)[0]].fill_(number))
    assert "contains NaN or infinity" in refusal(folder)


def test_a_file_without_tensors_is_refused_before_the_base_model_is_loaded(folder):
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has no tensors in adapter_model\.safetensors"):
        read_adapter(str(folder))


def test_an_adapter_that_was_changed_after_its_run_is_named(folder):
    assert read_adapter(str(folder)).notes == ()
    change_weights(folder, lambda weights: next(iter(weights.values())).mul_(2))
    (note,) = read_adapter(str(folder)).notes
    assert "adapter_model.safetensors was changed after its run" in note


def test_a_reader_ends_the_move_of_a_killed_run(folder):
    """The run was killed between its adapter and its run.json."""
    before, moved = json.loads((folder / "run.json").read_text()), folder / ".new"
    moved.mkdir()
    change_weights(folder, lambda weights: next(iter(weights.values())).mul_(2))
    write_provenance(folder, before | {"seed": 5})
    (folder / "run.json").rename(moved / "run.json")
    (folder / "run.json").write_text(json.dumps(before))
    (note,) = read_adapter(str(folder)).notes
    assert "Moved the finished adapter of a killed run" in note and not moved.exists()
    assert json.loads((folder / "run.json").read_text())["seed"] == 5 and read_adapter(str(folder)).notes == ()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_adapter_config_is_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        read_adapter(str(folder))


def test_a_truncated_file_is_refused_before_the_base_model_is_loaded(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    with pytest.raises(UserError, match=rf"damaged adapter_model\.safetensors \({whole - 1:,} bytes of {whole:,}\)\. Copy it"):
        read_adapter(str(folder))


def test_weights_in_a_pickle_are_refused_with_the_way_out(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError) as caught:
        read_adapter(str(folder))
    (line,) = caught.value.lines
    assert line == (
        f"--adapter: {folder}: holds no adapter: adapter_model.safetensors is missing, and adapter_model.bin is a pickle, which "
        "may run any code when it is loaded. Load and save it again with peft."
    )


def test_an_adapter_of_zeros_is_reported_and_answers_as_the_base_model(folder, capsys):
    change_weights(folder, lambda weights: [value.zero_() for name, value in weights.items() if "lora_B" in name])
    inference_example.main(["--adapter", str(folder), "--device", "cpu", "--prompt", "The river", "--compare", "--json",
                            "--max_new_tokens", "6"])  # fmt: skip
    out, err = capsys.readouterr()
    answered = json.loads(out)
    assert answered["text"] == answered["base"]["text"]
    changed, zeros, same = err.splitlines()
    assert "was changed after its run" in changed
    assert str(folder) in zeros and "all its B are zero" in zeros
    assert "does nothing here" in same


def test_an_adapter_of_another_architecture_is_refused(folder, other_models):
    (folder / "run.json").unlink()
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(other_models["gpt2"]))
    assert "does not fit" in refusal(folder) and str(other_models["gpt2"]) in refusal(folder)


def test_the_fingerprint_depends_on_tensors_and_not_on_files(tiny_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="2MB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights_fingerprint(tmp_path / "one") == weights_fingerprint(tmp_path / "many")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    assert weights_fingerprint(tmp_path / "other") != weights_fingerprint(tmp_path / "one")


def test_without_weights_there_is_no_fingerprint(tmp_path):
    assert weights_fingerprint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert weights_fingerprint(tmp_path) is None


def test_a_base_model_with_other_weights_is_refused(folder, two_layers_dir, tmp_path):
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["base_weights_sha256"] == weights_fingerprint(two_layers_dir)
    other = shutil.copytree(two_layers_dir, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "run.json", base_model={"name": str(other), "revision": None, "folder": str(other)})
    problem = refusal(folder)
    assert "trained on other weights" in problem and str(other) in problem and recorded["base_weights_sha256"][:12] in problem


def test_run_json_without_fingerprints_still_loads(folder):
    """Earlier versions wrote none."""
    provenance = json.loads((folder / "run.json").read_text())
    for name in ("base_commit", "base_weights_sha256", "stop_ids", "vocabulary_sha256"):
        del provenance[name]
    (folder / "run.json").write_text(json.dumps(provenance))
    generator = load(folder)
    assert provenance["separator_id"] in generator.encoder.stop_ids


@pytest.mark.parametrize("field, value", [
    ("prompt_style", "poem"), ("base_model", None), ("quantization", {"quant_type": "q8"}), ("quantization", {"load_in_4bit": 0}),
    ("base_model", {"name": ["x"]}), ("base_model", {"name": "a\x1b[2J"}), ("trust_remote_code", "no"), ("stop_ids", "abc"),
    ("stop_ids", [[1]]), ("stop_ids", [10**30]), ("stop_ids", []), ("base_weights_sha256", 5), ("data", [1]),
    ("vocabulary_sha256", "x"), ("base_commit", "a\nb"),
])  # fmt: skip
def test_a_damaged_run_json_is_one_line(folder, field, value):
    change_json(folder / "run.json", **{field: value})
    with pytest.raises(UserError, match=rf"has a damaged run\.json \({field}") as error:
        read_adapter(str(folder))
    assert len(error.value.lines) == 1 and error.value.lines[0].isprintable()


def test_a_stop_token_that_the_tokenizer_lacks_is_refused(folder):
    change_json(folder / "run.json", stop_ids=[6143, 999_999])
    assert "ends answers with token 999999" in refusal(folder)


def test_keys_that_are_left_out_are_one_line_and_peft_reads_no_settings_itself(folder, monkeypatch):
    change_json(folder / "adapter_config.json", megatron_core="os", **{"later\x1b[2J": 1, "a": 1, "b": 1, "c": 1})
    monkeypatch.setattr(peft.PeftConfig, "from_pretrained", None)
    load(folder)
    (note,) = read_adapter(str(folder)).notes
    assert note.endswith(r"left out of its adapter_config.json, as no LoRA needs it: later\x1b[2J, a, b and 1 more")


def test_a_rank_that_the_file_does_not_explain_is_refused_before_memory_is_taken(folder, monkeypatch):
    monkeypatch.setattr(peft_settings, "SLACK", 10**6)
    change_json(folder / "adapter_config.json", rank_pattern={"up_proj": 4096})
    monkeypatch.setattr(SwitchableAdapter, "__init__", None)
    # 2 layers, 7 projections of rank 16, of which up_proj (192 to 512) has rank 4,096
    held = sum(math.prod(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values())
    expected = held + 2 * (4096 - 16) * (192 + 512)
    assert f"needs {expected:,} numbers by its adapter_config.json, and its adapter_model.safetensors holds {held:,}" in refusal(
        folder
    )


def test_patterns_that_never_end_are_ended(folder, monkeypatch):
    monkeypatch.setattr(patterns.match_in_time, "__defaults__", (0.2,))
    change_json(folder / "adapter_config.json", target_modules="((a|[a-z_.0-9])+)+!")
    assert "has patterns in adapter_config.json that cannot be matched" in refusal(folder)
    change_json(folder / "adapter_config.json", target_modules=["q_proj"], rank_pattern={"((a|[a-z_.0-9])+)+!": 4})
    with pytest.raises(UserError, match="cannot be matched"):
        read_pairs(read_adapter(str(folder)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8])
def test_tensors_that_are_no_floating_point_numbers_are_refused(folder, dtype):
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2).to(dtype)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lora_A\.weight in |damaged"):
        read_adapter(str(folder))


@pytest.mark.parametrize("place", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("file", ["run.json", "config.yaml"])
def test_what_is_no_file_is_not_opened(folder, file, place):
    (folder / file).unlink()
    place(folder / file)
    with pytest.raises(UserError, match=r"no file|no regular file"):
        read_adapter(str(folder))


@pytest.mark.parametrize("name", ["~nosuchuser/x", "n" * 300, "a\0b", "a/loop", "\udcff"])
def test_an_odd_path_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to("loop")
    (tmp_path / "\udcff").mkdir()
    with pytest.raises(UserError) as error:
        read_adapter(name)
    assert len(error.value.lines) == 1 and error.value.problems[0].key == "--adapter"


def test_a_hub_model_is_loaded_at_the_commit_of_training(folder):
    change_json(folder / "run.json", base_model={"name": "some/model", "revision": None, "folder": None}, base_commit="abc123")
    assert read_adapter(str(folder)).model.revision == "abc123"


@pytest.mark.parametrize("name, words", [
    ("/gone/model", "is no existing folder. "), ("some/model", "is not on this machine, "),
])  # fmt: skip
def test_a_missing_base_model_is_reported_with_the_file_that_names_it(folder, name, words):
    flags = ["--adapter", str(folder), "--prompt", "x"]
    change_json(folder / "run.json", base_model={"name": name, "revision": None, "folder": None})
    with pytest.raises(UserError) as error:
        inference_example.main(flags)
    assert error.value.lines[0].startswith(f"--adapter: {folder}: names {name} in its run.json, which {words}")
    for file in ("run.json", "config.yaml"):
        (folder / file).unlink()
    change_json(folder / "adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(UserError) as error:
        inference_example.main(flags)
    (problem,) = error.value.lines
    assert problem.startswith(f"--adapter: {folder}: names {name} in its adapter_config.json, which {words}")


def test_a_tokenizer_with_another_vocabulary_is_refused(folder):
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(described))
    assert "another vocabulary" in refusal(folder)


def test_a_tokenizer_that_may_be_another_is_reported(folder, capsys):
    """Earlier versions wrote no fingerprint of the vocabulary."""
    provenance = json.loads((folder / "run.json").read_text())
    del provenance["vocabulary_sha256"]
    (folder / "run.json").write_text(json.dumps(provenance | {"tokenizer_sha256": "0" * 64}))
    load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert "tokenizer_sha256" in line and str(folder) in line


def test_a_tokenizer_with_more_tokens_than_the_base_model_is_refused(folder):
    (folder / "run.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{number}>" for number in range(2000)])
    tokenizer.save_pretrained(folder)
    assert "2,000 tokens (<new0>, <new1>, <new2> and 1,997 more) beyond the 6,144 rows of the embedding" in refusal(folder)


def test_the_adapters_own_tokenizer_and_template_are_used(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    change_json(folder / "run.json", prompt_style="chat")
    generator = load(folder, system="Be brief.")
    assert generator.encoder.tokenizer.decode(generator.encode("Hello")) == "[system] Be brief.\n[user] Hello\n"


def test_without_a_tokenizer_of_its_own_the_base_models_is_used(folder):
    (folder / "tokenizer.json").unlink()
    source = read_adapter(str(folder))
    assert source.tokenizer == source.model


def test_a_template_that_takes_no_system_message_is_one_line(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    change_json(folder / "run.json", prompt_style="chat")
    with pytest.raises(UserError, match="no system role"):
        load(folder, system="Be brief.").encode("Hello")


def test_answers_end_where_run_json_says(folder):
    recorded = json.loads((folder / "run.json").read_text())["stop_ids"]
    assert load(folder).encoder.stop_ids == recorded
    change_json(folder / "run.json", stop_ids=[7])
    assert load(folder).encoder.stop_ids == [7]


def test_the_end_of_a_turn_stops_an_answer_even_if_it_is_not_the_tokenizers_eos(tiny_dir):
    """Qwen's base models: eos is <|endoftext|>, turns end with <|im_end|>."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    text_end, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tokenizer.eos_token = "<|endoftext|>"
    assert find_stop_ids(tokenizer, "chat") == sorted([text_end, turn_end])
    assert find_stop_ids(tokenizer, "text") == [text_end]


def test_a_checkpoint_uses_the_run_json_of_its_run(adapter, folder, capsys):
    arguments = ["--device", "cpu", "--prompt", "The river", "--max_new_tokens", "8", "--temperature", "0"]
    inference_example.main(["--adapter", str(adapter), *arguments])
    expected = capsys.readouterr().out
    checkpoint = folder / "checkpoints" / "checkpoint-4"  # of the run's last step
    inference_example.main(["--adapter", str(checkpoint), *arguments])
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == expected
    assert "checkpoint" in line and str(folder / "run.json") in line


def test_a_checkpoint_of_an_unfinished_run_uses_the_runs_settings(folder):
    (folder / "run.json").unlink()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("quant_type: nf4", "quant_type: fp4"))
    source = read_adapter(str(folder / "checkpoints" / "checkpoint-4"))
    assert source.quantization.quant_type == "fp4" and source.style == "text"
    (note,) = source.notes
    assert "no run.json" in note and "FP4" in note and "plain text" in note


@pytest.mark.parametrize(
    "stated, style",
    [("auto", "text"), ("text", "text"), ("instruction", "instruction"), ("alpaca", "chat"), ("messages", "chat")],
)
def test_the_data_format_decides_the_prompts_of_a_run_without_checkpoints(folder, stated, style):
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("format: auto", f"format: {stated}"))
    assert read_adapter(str(folder)).style == style


def test_the_checkpoint_decides_the_prompts_of_an_unfinished_run(folder):
    (folder / "run.json").unlink()
    manifest = folder / "checkpoints" / "checkpoint-4" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["run"]["prompt_style"] = "instruction"
    del content["sha256"]
    manifest.write_text(
        json.dumps(content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()})
    )
    assert read_adapter(str(folder)).style == read_adapter(str(manifest.parent)).style == "instruction"


def test_a_plain_adapter_with_its_own_chat_template_uses_it_for_prompts(folder):
    (folder / "run.json").unlink()
    (folder / "config.yaml").unlink()
    source = read_adapter(str(folder))
    (note,) = source.notes
    assert source.style == "chat" and "chat template" in note and "NF4" in note
    (folder / "chat_template.jinja").unlink()
    assert read_adapter(str(folder)).style == "text"


def test_a_folder_cannot_allow_its_own_code_to_run(folder):
    """run.json, and config.yaml if it is missing, may come from anyone."""
    change_json(folder / "run.json", trust_remote_code=True)
    with pytest.raises(UserError, match=r"would run here with all your rights\. Add --trust_remote_code"):
        read_adapter(str(folder))
    source = read_adapter(str(folder), trust_remote_code=True)
    assert source.model.trust_remote_code and source.tokenizer.trust_remote_code
    assert "with all your rights" in source.notes[-1]
    change_json(folder / "run.json", trust_remote_code=False)
    plain = read_adapter(str(folder))
    assert not plain.model.trust_remote_code and not any("rights" in note for note in plain.notes)
