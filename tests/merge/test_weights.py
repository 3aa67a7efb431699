"""Merge into models whose files name tensors otherwise than their modules, or hold other tensors than they load."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import Transpose, WeightConverter

from qlora_kit.errors import UserError
from tests.merge.test_command import loaded_for_training, logits, make_adapter, merged_by_peft, run_merge, stored

TEXT = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 6144, "bos_token_id": 6141, "eos_token_id": 6143, "pad_token_id": 6141,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
SETTINGS = {  # model type: its config, and what its files call layer 0's down_proj
    "gemma3": (
        {"text_config": {**TEXT, "head_dim": 32}, "vision_config": {**VISION, "patch_size": 16}, "mm_tokens_per_image": 4},
        "language_model.model.layers.0.mlp.down_proj.weight",
    ),
    "exaone": (TEXT, "transformer.h.0.mlp.c_proj.weight"),
}


@pytest.fixture(scope="module", params=SETTINGS)
def renamed(request, tmp_path_factory, tiny_dir) -> Path:
    if request.param not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {request.param}")
    folder, (settings, name) = tmp_path_factory.mktemp(request.param), SETTINGS[request.param]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    assert name in stored(folder)
    return folder


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_renamed_tensors_are_merged_under_the_names_of_the_base(renamed, tmp_path, onto):
    adapter = make_adapter(renamed, tmp_path / "adapter", {"load_in_4bit": True}, target_modules=["q_proj", "down_proj"])
    merged = run_merge(adapter, tmp_path / "out", "--base", onto)
    assert set(merged) == set(stored(renamed))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if onto == "original":
        base, reference = AutoModelForCausalLM.from_pretrained(renamed), merged_by_peft(renamed, adapter)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-6, atol=1e-7)
    else:
        base = loaded_for_training(renamed, "nf4", True)
    without = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    assert (expected - without).abs().max() > 0.01


@pytest.mark.parametrize("onto, words", [
    ("original", "--adapter: .*changes model.layers.0.self_attn.q_proj, whose weight is no tensor of its own.* merge_and_unload"),
    ("dequantized", "--base: dequantized: needs model.layers.0.self_attn.k_proj, which is no tensor of its own"),
])  # fmt: skip
def test_a_tensor_that_loading_computes_is_refused_before_anything_is_written(tiny_dir, tmp_path, monkeypatch, onto, words):
    name = r"self_attn\.q_proj\.weight" if onto == "original" else r"self_attn\.k_proj\.weight"
    rule = WeightConverter(name, name.replace("\\", ""), [Transpose(0, 1)])
    monkeypatch.setattr("qlora_kit.merge.weights.get_model_conversion_mapping", lambda model: [rule])
    adapter = make_adapter(tiny_dir, tmp_path / "adapter", {"load_in_4bit": True})
    with pytest.raises(UserError, match=words):
        run_merge(adapter, tmp_path / "place" / "out", "--base", onto)
    assert not (tmp_path / "place").exists()
