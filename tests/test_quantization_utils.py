"""Load, pack and wrap the embedded model and small random Llama and GPT-2 models, with real NF4 and real LoRA on the CPU."""

import inspect
import json
import re
import shutil
import textwrap
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import quantization_utils
from qlora_kit.adapter.fold import dequantize
from qlora_kit.errors import UserError
from qlora_kit.model import load as model_load
from qlora_kit.planning.shape import read_shape
from quantization_utils import create_bnb_config, create_lora_config, load_model_and_tokenizer, prepare_model_for_training

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2  # those of tiny-qwen2 that are kept; as its README says: hidden 192, MLP 512, 6 heads of 32, 2 KV heads
IDS = torch.arange(100, 148).reshape(2, 24)  # (B, T)


def load(folder: Path, dtype=torch.bfloat16, quantization="nf4"):
    packing = create_bnb_config(quantization, dtype) if isinstance(quantization, str) else quantization
    return load_model_and_tokenizer(str(folder), packing, device="cpu", dtype=dtype)


def adapted(folder: Path, dtype=torch.float32, recompute=False, seed=0, **lora):
    model, _ = load(folder, dtype)
    torch.manual_seed(seed)
    model = prepare_model_for_training(model, create_lora_config(**{"dropout": 0.0} | lora), recompute)
    return model


def fill_b(model, seed=1) -> None:
    """B non-zero, so that A gets a gradient too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)


def lora_gradients(model, ids=IDS) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_module_defines_exactly_its_four_public_functions():
    defined = [
        name
        for name, function in inspect.getmembers(quantization_utils, inspect.isfunction)
        if function.__module__ == "quantization_utils" and not name.startswith("_")
    ]
    assert sorted(defined) == [
        "create_bnb_config", "create_lora_config", "load_model_and_tokenizer", "prepare_model_for_training",
    ]  # fmt: skip


def test_the_example_of_the_module_runs_on_a_machine_without_a_gpu(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    example = textwrap.dedent(re.search(r"(?:^    .*\n)+", quantization_utils.__doc__, re.M)[0])
    names = {}
    exec(f"from quantization_utils import *\n{example}", names)
    model = names["model"]
    assert isinstance(model, peft.PeftModel) and len(names["tokenizer"]) == 6144
    assert all(gradient.isfinite().all() for gradient in lora_gradients(model).values())


def test_the_functions_work_with_nothing_but_their_defaults(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = load_model_and_tokenizer(str(root / "assets" / "tiny-qwen2"))
    projection = model.model.layers[0].mlp.up_proj
    assert projection.weight.quant_state.quant_type == "nf4" and projection.weight.quant_state.nested
    assert projection.compute_dtype == model.dtype == torch.float32  # as usable_dtype chooses for a CPU
    assert create_bnb_config().bnb_4bit_quant_type == "nf4"
    assert prepare_model_for_training(model, create_lora_config()).get_nb_trainable_parameters()[0] == 325_632


def test_a_gpu_that_is_not_there_is_one_line(two_layers_dir, monkeypatch):
    """from_pretrained raises RuntimeError: Cannot access accelerator device when none is available."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device: cuda: needs a GPU, and torch finds none\. .*"):
        load_model_and_tokenizer(str(two_layers_dir), device="cuda")


def test_no_function_takes_more_than_seven_parameters():
    functions = [function for _, function in inspect.getmembers(quantization_utils, inspect.isfunction)]
    assert max(len(inspect.signature(function).parameters) for function in functions) <= 7


def test_bnb_config_defaults_are_those_of_the_qlora_paper():
    config = create_bnb_config()
    assert config.load_in_4bit and not config.load_in_8bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.bnb_4bit_use_double_quant is True


def test_bnb_config_holds_its_arguments():
    config = create_bnb_config("fp4", torch.float16, use_double_quant=False)
    assert config.bnb_4bit_quant_type == "fp4"
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert config.bnb_4bit_use_double_quant is False


@pytest.mark.parametrize("wrong", ["int4", "NF4", ""])
def test_bnb_config_refuses_another_quant_type(wrong):
    with pytest.raises(ValueError, match="nf4 or fp4") as error:
        create_bnb_config(wrong)
    assert repr(wrong) in str(error.value)


def test_lora_config_holds_its_arguments():
    config = create_lora_config(rank=8, alpha=20, dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 20, 0.1)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.task_type == "CAUSAL_LM"
    assert config.bias == "none"


def test_lora_config_targets_the_seven_projections_by_default():
    assert set(create_lora_config().target_modules) == set(SEVEN)


def test_a_whole_alpha_is_written_as_a_whole_number(tmp_path):
    """llama.cpp and vLLM read lora_alpha as an integer; the config holds 32.0."""
    create_lora_config(alpha=32.0).save_pretrained(tmp_path)
    assert '"lora_alpha": 32,' in (tmp_path / "adapter_config.json").read_text()


def test_a_fractional_alpha_is_not_rounded():
    assert create_lora_config(alpha=12.5).lora_alpha == 12.5


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_seven_projections_and_nothing_else_are_packed(two_layers_dir, quant_type):
    model, _ = load(two_layers_dir, quantization=quant_type)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert sorted(name.rpartition(".")[2] for name in packed) == sorted(SEVEN * LAYERS)
    assert {module.weight.quant_state.quant_type for module in packed.values()} == {quant_type}
    assert {module.weight.dtype for module in packed.values()} == {torch.uint8}
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    assert type(model.model.embed_tokens) is torch.nn.Embedding


@pytest.mark.parametrize("double", [True, False])
def test_double_quantization_packs_the_absmax_values_too(two_layers_dir, double):
    model, _ = load(two_layers_dir, quantization=create_bnb_config(use_double_quant=double))
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.nested is double
    assert state.absmax.dtype == (torch.uint8 if double else torch.float32)
    assert state.absmax.numel() == 192 * 512 // 64  # one scale per 64 weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_that_is_not_packed_has_the_given_dtype(two_layers_dir, dtype):
    model, _ = load(two_layers_dir, dtype)
    unpacked = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.dtype != torch.uint8}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= unpacked.keys()
    assert set(unpacked.values()) == {dtype}
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == dtype


def test_every_packed_weight_is_the_nearest_of_the_16_nf4_levels(two_layers_dir):
    """The levels as QLoRA's appendix E prints them, scaled by the largest weight of each block of 64."""
    levels = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])  # fmt: skip
    original, _ = load_model_and_tokenizer(str(two_layers_dir), None, device="cpu", dtype=torch.float32)
    model, _ = load(two_layers_dir, torch.float32, create_bnb_config("nf4", torch.float32, use_double_quant=False))
    weight = model.model.layers[1].mlp.down_proj.weight
    unpacked = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float().reshape(-1, 64)
    wanted = original.model.layers[1].mlp.down_proj.weight.detach().reshape(-1, 64)
    scales = wanted.abs().amax(dim=1, keepdim=True)
    smallest_error = (wanted[..., None] - scales[..., None] * levels).abs().amin(dim=-1)
    torch.testing.assert_close((unpacked - wanted).abs(), smallest_error, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_quantization_config_no_weight_is_packed(two_layers_dir, dtype):
    model, _ = load(two_layers_dir, dtype, quantization=None)
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_folder_that_is_no_language_model_is_the_users_mistake(two_layers_dir, tmp_path):
    AutoTokenizer.from_pretrained(two_layers_dir).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.name: .*cannot be loaded") as error:
        load(tmp_path)
    assert len(error.value.lines) == 1 and "\n" not in error.value.lines[0]


def copy_model(two_layers_dir: Path, folder: Path) -> Path:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(two_layers_dir / name, folder / name)
    return folder


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_the_padding_token_never_ends_a_turn(two_layers_dir, tmp_path, pad):
    copy_model(two_layers_dir, tmp_path)
    shutil.copy(two_layers_dir / "tokenizer.json", tmp_path)
    settings = json.loads((two_layers_dir / "tokenizer_config.json").read_text()) | {"eos_token": "<|im_end|>", "pad_token": pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model, tokenizer = load(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_padding_token_that_ends_no_turn_is_kept(two_layers_dir, tmp_path):
    copy_model(two_layers_dir, tmp_path)
    shutil.copy(two_layers_dir / "tokenizer.json", tmp_path)
    settings = json.loads((two_layers_dir / "tokenizer_config.json").read_text()) | {"pad_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer = load(tmp_path)
    assert tokenizer.pad_token == "<|im_start|>"


def test_a_tokenizer_with_one_special_token_pads_with_it_as_gpt2_does(two_layers_dir, tmp_path):
    copy_model(two_layers_dir, tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert model.config.pad_token_id == 2


def test_only_the_adapters_are_trained_and_they_are_fp32(two_layers_dir):
    model = adapted(two_layers_dir, torch.bfloat16)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * LAYERS
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_starts_from_the_base_model_exactly(two_layers_dir, dtype):
    model, _ = load(two_layers_dir, dtype)
    with torch.no_grad():
        base = model.eval()(IDS).logits
    wrapped = prepare_model_for_training(model, create_lora_config(), use_gradient_checkpointing=False).eval()
    b = [parameter for name, parameter in wrapped.named_parameters() if "lora_B" in name]
    a = [parameter for name, parameter in wrapped.named_parameters() if "lora_A" in name]
    assert all(not parameter.any() for parameter in b) and all(parameter.any() for parameter in a)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(IDS).logits, base, rtol=0, atol=0)


def test_frozen_parameters_keep_their_dtype_unlike_in_pefts_own_preparation(two_layers_dir):
    """The upcast of the embedding alone would take 0.58 GiB at Qwen2.5-3B's size."""
    model = adapted(two_layers_dir, torch.bfloat16)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.uint8, torch.bfloat16}

    pefts, _ = load(two_layers_dir)
    pefts = peft.prepare_model_for_kbit_training(pefts, use_gradient_checkpointing=False)
    assert pefts.model.embed_tokens.weight.dtype == pefts.model.norm.weight.dtype == torch.float32
    upcast = [parameter for parameter in pefts.parameters() if parameter.dtype == torch.float32]
    saved = sum(parameter.nbytes for parameter in pefts.parameters()) - sum(parameter.nbytes for parameter in frozen)
    assert saved == sum(parameter.nbytes for parameter in upcast) // 2


def test_gradient_checkpointing_changes_no_gradient(two_layers_dir):
    gradients, passes = {}, {}
    for recompute in (True, False):
        model = adapted(two_layers_dir, recompute=recompute)
        fill_b(model)
        calls = []
        mlp = model.base_model.model.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients[recompute], passes[recompute] = lora_gradients(model), len(calls)
    assert passes == {True: 2, False: 1}  # the second forward pass is the recomputation
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-5, atol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in gradients[True].values())


def test_rank_16_trains_as_many_parameters_as_computed_by_hand(tiny_dir):
    # in + out of q, k, v, o, gate, up, down; times rank, times layers
    by_hand = 16 * 6 * ((192 + 192) + 2 * (192 + 64) + (192 + 192) + 2 * (192 + 512) + (512 + 192))
    assert by_hand == 325_632
    trainable, total = adapted(tiny_dir, rank=16).get_nb_trainable_parameters()
    assert trainable == by_hand
    assert total == 3_543_360 + by_hand  # the base model's as its README says, a packed byte counted as two weights
    shape = read_shape(json.loads((tiny_dir / "config.json").read_text()))
    assert shape.lora_parameters(16, SEVEN) == by_hand


def test_all_linear_targets_every_projection_but_the_head(two_layers_dir):
    model = adapted(two_layers_dir, rank=4, target_modules="all-linear")
    wrapped = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert wrapped == set(SEVEN)


@pytest.mark.parametrize("targets, wrong", [
    (["c_attn"], "c_attn"),
    (["q_proj", "query"], "query"),
    (["lm_head"], "lm_head"),
    (["embed_tokens"], "embed_tokens"),
    (["mlp.q_proj"], "mlp.q_proj"),
    (["v_proj", "mlp.q_proj"], "mlp.q_proj"),
])  # fmt: skip
def test_a_target_that_matches_nothing_is_refused_with_those_that_would(two_layers_dir, targets, wrong):
    model, _ = load(two_layers_dir)
    with pytest.raises(UserError) as error:
        prepare_model_for_training(model, create_lora_config(target_modules=targets))
    (problem,) = error.value.lines
    assert problem.startswith(f"lora.target_modules: {wrong}: ")
    assert all(name in problem for name in [*SEVEN, "all-linear"])
    assert "embed_tokens" not in problem.partition(". Use ")[2] and "lm_head" not in problem.partition(". Use ")[2]


def test_a_target_may_be_narrowed_by_its_parent(two_layers_dir):
    model = adapted(two_layers_dir, target_modules=["self_attn.q_proj", "layers.0.mlp.up_proj"])
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == LAYERS + 1


def test_an_evaluation_does_not_change_the_gradients_that_follow(two_layers_dir):
    """bitsandbytes repacks weights for AVX512-BF16 at the first evaluation; that product has no gradient."""
    fresh, evaluated = adapted(two_layers_dir, torch.bfloat16), adapted(two_layers_dir, torch.bfloat16)
    evaluated.eval()
    with torch.no_grad():
        evaluated(IDS)
    torch.testing.assert_close(lora_gradients(evaluated), lora_gradients(fresh), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 24])  # bitsandbytes has a product of its own for a single row
def test_a_projection_computes_its_4_bit_product_plus_the_scaled_update(two_layers_dir, tokens):
    """y = x Wᵀ + bias + (alpha / r) x Aᵀ Bᵀ, with W as bitsandbytes unpacks it; alpha / r = 3."""
    model = adapted(two_layers_dir, rank=4, alpha=12.0).eval()
    fill_b(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    packed = layer.base_layer.weight
    weight = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).float()
    assert weight.shape == (192, 192)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(1, tokens, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        update = 3.0 * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias) + update, rtol=1e-4, atol=1e-4)
    assert update.abs().max() > 0.01


@pytest.mark.parametrize("name, targets, count", [
    ("llama", SEVEN, 14),
    ("llama", "all-linear", 14),
    ("gpt2", ["c_attn", "c_proj", "c_fc"], 8),  # both attention and MLP have a c_proj
    ("gpt2", "all-linear", 8),
])  # fmt: skip
def test_other_architectures_load_in_4_bits_and_every_adapter_learns(other_models, name, targets, count):
    model, _ = load(other_models[name], torch.float32)
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules()) == count
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    model = prepare_model_for_training(model, create_lora_config(rank=4, dropout=0.0, target_modules=targets))
    gradients = {key: value for key, value in lora_gradients(model).items() if "lora_B" in key}
    assert len(gradients) == count
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_gpt2s_transposed_weights_are_transposed_before_packing(other_models):
    """Conv1D keeps (in, out), Linear4bit (out, in): c_attn is 64 -> 192; c_proj is 64 -> 64, where a mistake does not crash."""
    whole, _ = load(other_models["gpt2"], torch.float32, quantization=None)
    packed, _ = load(other_models["gpt2"], torch.float32)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for name in ("c_attn", "c_proj"):
        with torch.no_grad():
            expected = getattr(whole.transformer.h[0].attn, name)(x)
            got = getattr(packed.transformer.h[0].attn, name)(x)
        assert (got - expected).norm() / expected.norm() < 0.15  # NF4's own error is about 0.09


def test_the_padding_token_of_an_untied_head_is_set_in_both_configs(other_models):
    model, tokenizer = load(other_models["llama"])
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_targets_of_another_architecture_are_refused_with_gpt2s_own(other_models):
    model, _ = load(other_models["gpt2"])
    with pytest.raises(UserError, match="c_attn, c_fc, c_proj"):
        prepare_model_for_training(model, create_lora_config(target_modules=["q_proj"]))


def test_weights_that_this_processor_would_dequantize_wrongly_are_refused(two_layers_dir, monkeypatch):
    """bitsandbytes 0.50.2 dequantizes rows of 80 wrongly on processors with AVX-512; here rows of 512, those of down_proj."""
    assert model_load.dequantizes_correctly(192) and model_load.dequantizes_correctly(512)
    untouched = bitsandbytes.functional.dequantize_4bit

    def wrong(packed, state, **rest):
        right = untouched(packed, state, **rest)
        return right.flip(1) if state.shape[1] == 512 else right

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", wrong)
    model_load.dequantizes_correctly.cache_clear()
    try:
        with pytest.raises(
            UserError, match=r"rows of 512 weights, .* wrongly .*\. Use a GPU, or quantization.load_in_4bit: false\.$"
        ):
            load_model_and_tokenizer(str(two_layers_dir), create_bnb_config(), device="cpu", dtype=torch.float32)
    finally:
        model_load.dequantizes_correctly.cache_clear()


@pytest.mark.parametrize("shape", [(64, 80), (48, 96), (16, 64), (10, 30)])
def test_merging_unpacks_rows_of_every_length(shape):
    torch.manual_seed(0)
    values = torch.randn(shape)
    packed, state = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    packed = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state)
    error = (dequantize(packed) - values).norm() / values.norm()
    assert dequantize(packed).shape == shape and error < 0.11  # NF4 of normal numbers: 0.09
