"""Load base models whose files are incomplete, do not fit their config.json, or are packed already."""

import warnings

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from qlora_kit.errors import UserError
from qlora_kit.fast.sharding import load_sharded
from qlora_kit.model.load import describe_unused, load_base_model
from quantization_utils import create_bnb_config, load_model_and_tokenizer
from tests.model.saved_models import TINY, change_model, save_model, save_packed

NF4 = create_bnb_config(compute_dtype=torch.float32)
IDS = torch.arange(100, 124)[None]


def load(folder, quantization=NF4):
    return load_base_model(folder, quantization, device="cpu", dtype=torch.float32)


def refusal(folder, quantization=NF4) -> str:
    with pytest.raises(UserError) as error:
        load(folder, quantization)
    (line,) = error.value.lines
    return line.removeprefix(f"model.name: {folder}: ")


@pytest.mark.parametrize("lacks, packing, named", [
    ("layernorm", None, "no model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight, "
                        "model.layers.1.input_layernorm.weight and 9 more in its files. Copy or download"),
    ("embed_tokens", None, "no lm_head.weight, model.embed_tokens.weight in its files"),  # tied: both are random then
    ("layers.3.mlp.up_proj", NF4, "no model.layers.3.mlp.up_proj.weight in its files"),
    ("q_proj.bias", None, "no model.layers.0.self_attn.q_proj.bias, "),
])  # fmt: skip
def test_tensors_that_the_files_lack_are_named(tmp_path, lacks, packing, named):
    """The library fills them with random numbers and says nothing that a user sees: the run ended with status 0."""
    assert refusal(change_model(tmp_path / "base", lambda name: lacks not in name), packing).startswith(f"has {named}")


@pytest.mark.parametrize("config, packing, named", [
    # The library compares the shape of no weight that it packs.
    ({"intermediate_size": 448}, NF4, "model.layers.0.mlp.down_proj.weight of 192 x 512 in its files, and its config.json makes "
                                      "it 192 x 448, as 17 more differ. Restore its config.json"),
    ({"num_key_value_heads": 6}, None, "model.layers.0.self_attn.k_proj.bias of 64 in its files, and its config.json makes it "),
    ({"vocab_size": 6200}, None, "model.embed_tokens.weight of 6144 x 192 in its files, and its config.json makes it 6200 x 192"),
])  # fmt: skip
def test_tensors_of_another_shape_are_named(tmp_path, config, packing, named):
    assert refusal(change_model(tmp_path / "base", **config), packing).startswith(f"has {named}")


def test_a_shard_of_an_incomplete_model_is_refused_like_the_whole(tmp_path):
    for change, named in (
        ({"keep": lambda name: "layernorm" not in name}, "no model.layers.0.input_layernorm.weight in its files"),
        ({"intermediate_size": 448}, "model.layers.0.mlp.gate_proj.weight of 512 x 192 in its files"),
    ):
        with pytest.raises(UserError, match=rf"^model.name: has {named}"):
            load_sharded(change_model(tmp_path / named[:2], **change), NF4, "cpu", torch.float32, False, False)


def test_buffers_of_older_libraries_are_no_missing_and_no_unknown_tensors(tmp_path):
    older = {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.ones(16) for number in range(6)}
    model = load(change_model(tmp_path / "base", added=older), None)
    assert torch.equal(model(IDS).logits, load(change_model(tmp_path / "same"), None)(IDS).logits)
    assert describe_unused(model, "base") is None


def test_tensors_that_the_model_has_no_place_for_are_told(tmp_path):
    """A config.json with too few layers makes another model of the files, which the library loads without a word."""
    settings = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    model = load(change_model(tmp_path / "base", **settings), None)
    assert describe_unused(model, "base") == (
        "The files of base hold 24 tensors that the model does not use: model.layers.4.input_layernorm.weight, "
        "model.layers.4.mlp.down_proj.weight, model.layers.4.mlp.gate_proj.weight and 21 more"
    )
    assert describe_unused(load(change_model(tmp_path / "whole"), None), "base") is None


@pytest.mark.parametrize("config, words", [
    ({"rms_norm_eps": "small"}, "states rms_norm_eps"),
    ({"hidden_act": "no-such-function"}, "cannot be loaded"),
    ({"layer_types": ["no-such-attention"] * 8}, "cannot be loaded"),
])  # fmt: skip
def test_what_the_library_raises_is_one_line_whatever_its_type(tmp_path, config, words):
    assert words in refusal(change_model(tmp_path / "base", **config), None)


def test_a_model_of_which_nothing_is_packed_is_refused(tmp_path):
    """bitsandbytes says so to the library's log only; the run reported 4 bits and took the memory of 16."""
    GPT2LMHeadModel(GPT2Config(n_layer=0, n_embd=64, n_head=4, n_positions=64, vocab_size=100)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^quantization.load_in_4bit: true: packs no projection of .*\. Use false"):
        load(tmp_path)
    load(tmp_path, None)


@pytest.mark.parametrize("name", ["falcon", "falcon_bias", "mamba", "gemma3n"])
def test_models_with_layers_of_their_own_compute_with_the_packed_weights(name):
    """Falcon's Linear was left in 16 bits; Mamba and Gemma 3n read weights of some layers, which must not be packed."""
    model = load(save_model(name))
    whole = AutoModelForCausalLM.from_pretrained(save_model(name), dtype=torch.float32)
    layers = {layer: module for layer, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == {"falcon": 8, "falcon_bias": 8, "mamba": 2, "gemma3n": 26}[name]
    for layer, module in layers.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        original = whole.get_submodule(layer).weight
        assert 0 < (weight - original).norm() / original.norm() < 0.15
        original.data = weight
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_packed_already_keeps_its_own_form():
    folder = save_packed()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "already has a `quantization_config` attribute"
        model, _ = load_model_and_tokenizer(str(folder), device="cpu")
    packed = model.model.layers[0].mlp.up_proj
    assert (packed.weight.quant_state.quant_type, packed.weight.quant_state.nested) == ("fp4", False)
    assert packed.compute_dtype == torch.float32  # its config.json says float16
    assert type(model.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    again = load(TINY, create_bnb_config("fp4", torch.float32, use_double_quant=False))
    assert torch.equal(packed.weight.data, again.model.layers[0].mlp.up_proj.weight.data)


def test_a_quantization_that_contradicts_the_files_is_refused():
    folder = save_packed()
    with pytest.raises(UserError, match=r"^quantization.quant_type: nf4: contradicts the files of .* with quant_type fp4\. "):
        load(folder)
    load(folder, create_bnb_config("fp4", torch.float32, use_double_quant=False))


def test_packed_files_without_the_scales_of_a_weight_are_refused(tmp_path):
    keep = "model.layers.0.mlp.up_proj.weight."
    folder = change_model(tmp_path / "base", lambda name: not name.startswith(keep), save_packed())
    assert refusal(folder, None).startswith(f"has no {keep[:-1]} in its files")


@pytest.mark.parametrize("settings, form", [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ"),
    ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "AWQ"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes' 8 bits"),
    ({"quant_method": "of-tomorrow"}, "of-tomorrow"),
    ({"bits": 4}, "an unknown method"),
])  # fmt: skip
def test_other_quantized_files_are_refused_with_the_way_out(tmp_path, settings, form):
    line = refusal(change_model(tmp_path / "base", quantization_config=settings), None)
    assert line.startswith(f"has weights that are quantized already, by {form}") and "Use the 16-bit model" in line


@pytest.mark.parametrize("changes, words", [
    ({"vocab_size": 10**7}, "holds "),
    ({"intermediate_size": 10**6}, "holds "),
    ({"num_hidden_layers": 500, "layer_types": None}, "states 500 layers in its config.json, and its files hold "),
])  # fmt: skip
def test_a_config_of_a_much_larger_model_is_refused_before_memory_is_taken(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for packing in (None, NF4):
        assert refusal(change_model(tmp_path / str(packing is None), **changes), packing).startswith(words)


def test_plain_weights_that_call_themselves_packed_are_refused(tmp_path):
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    line = refusal(change_model(tmp_path / "base", quantization_config=packed), None)
    assert line.startswith("has a quantization_config in its config.json, and weights that are not packed")
