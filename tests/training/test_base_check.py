"""Train on base models that are packed already, or that the settings do not fit, through the command."""

import json

import pytest

import train_qlora
from qlora_kit.config import Config
from qlora_kit.config_file import override
from qlora_kit.errors import UserError
from qlora_kit.model import load
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.training.base_check import check_base
from quantization_utils import create_lora_config
from tests.model.saved_models import TINY, save_model, save_packed

SMALL = [
    "--config", "configs/tiny.yaml", "--max_length", "16", "--batch_size", "1", "--max_steps", "1",
    "--set", "training.gradient_accumulation_steps=1", "--set", "data.max_train_samples=2", "--set", "data.max_eval_samples=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(root, monkeypatch):
    monkeypatch.chdir(root)


def test_a_run_records_the_form_that_the_base_models_files_have(tmp_path):
    """FP4 files were reported as NF4 with double quantization."""
    train_qlora.main([*SMALL, "--model_name", str(save_packed()), "--output_dir", str(tmp_path / "out")])
    log = (tmp_path / "out" / "training_log.txt").read_text()
    assert "4-bit FP4, computing in float32" in log
    assert "are 4-bit FP4 without double quantization already, made to compute in float16, and stay so" in log
    assert "Projections: 2,260,992 of 2,359,296 weights in 4 bits; 98,304 of 2,359,296 stay in 32 bits: q_proj (36,864)" in log
    assert "on 42 of 42 projections" in log
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["quantization"] == {
        "load_in_4bit": True, "quant_type": "fp4", "use_double_quant": False, "compute_dtype": "float32",
    }  # fmt: skip
    assert run["base_quantization"]["compute_dtype"] == "float16"
    assert run["projections"]["weights_in_4bit"] == 2_260_992 and run["projections"]["with_lora"] == 42


def test_a_mixture_of_experts_says_what_is_packed_and_what_is_trained(tmp_path, capsys):
    flags = ["--model_name", str(save_model("mixtral")), "--set", "lora.target_modules=[q_proj,v_proj]"]
    train_qlora.main([*SMALL, *flags, "--output_dir", str(tmp_path / "out")])
    log = capsys.readouterr().err
    assert "Projections: 24,576 of 221,696 weights in 4 bits; 197,120 of 221,696 stay in 32 bits: experts (196,608), gate" in log
    assert "on 4 of 14 projections; not on k_proj, o_proj, gate, experts" in log


@pytest.mark.parametrize("name, flags, words", [
    ("mixtral", ["--set", "lora.target_modules=all-linear"], "lora.dropout: 0.05: "),
    ("mixtral", [], "lora.target_modules: down_proj, gate_proj, up_proj: "),
    ("llama", ["--set", "lora.target_modules=[q_proj,query]"], "lora.target_modules: query: "),
    ("llama", ["--max_length", "129"], "data.max_length: 129: "),
])  # fmt: skip
def test_what_config_json_tells_is_answered_before_data_and_weights(tmp_path, monkeypatch, name, flags, words):
    monkeypatch.setattr(load, "load_base_model", None)
    monkeypatch.setattr(train_qlora, "prepare_dataset", None)
    with pytest.raises(UserError) as error:
        train_qlora.main([*SMALL, "--model_name", str(save_model(name)), *flags, "--output_dir", str(tmp_path / "out")])
    (line,) = error.value.lines
    assert line.startswith(words)


def test_experts_that_fill_the_memory_are_announced_before_they_are_loaded(monkeypatch):
    from qlora_kit.training import base_check

    config = override(Config(), {"model.name": str(save_model("mixtral")), "data.max_length": 64})
    lora, tokenizer = create_lora_config(target_modules=["q_proj"]), load_tokenizer(config.model)
    assert check_base(config, lora, tokenizer, fast=False) is None
    monkeypatch.setattr(base_check, "LARGE", 100_000)
    note = check_base(config, lora, tokenizer, fast=False)
    assert "197,120 of 221,696 projection weights cannot be packed" in note and note.endswith("experts (196,608), gate (512)")
    assert check_base(override(config, {"model.name": str(TINY)}), lora, tokenizer, fast=True) is None
